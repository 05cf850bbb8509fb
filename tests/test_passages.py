"""Passages of documents, and which of them belong to a question."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.documents import document_files
from lib.passages import DocumentError, Passage, PassageIndex, read_passages, terms


def write(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        path = folder / name.replace("__", "/").replace("_md", ".md").replace("_txt", ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def split(tmp_path: Path, text: str, *, longest: int = 60) -> list[tuple[str, str]]:
    passages = read_passages(write(tmp_path, a_md=text), longest=longest)
    assert all(0 < len(each.text) <= longest and each.source == "a.md" for each in passages)
    return [(each.heading, each.text) for each in passages]


def test_paragraphs_under_a_heading_are_joined_while_short(tmp_path: Path) -> None:
    paragraphs = ["# One", "A first paragraph.", "A second.", "A third paragraph, which does not fit any more."]
    assert split(tmp_path, "\n\n".join([*paragraphs, "## Two\nIts text.\n"])) == [
        ("One", "A first paragraph.\n\nA second."),
        ("One", "A third paragraph, which does not fit any more."),
        ("Two", "Its text."),
    ]


def test_long_paragraphs_are_split_between_sentences(tmp_path: Path) -> None:
    text = "The first sentence is here. The second one is as long! Is the third? 日本語の文です。次の文です。"
    assert split(tmp_path, text, longest=54) == [
        ("", "The first sentence is here. The second one is as long!"),
        ("", "Is the third? 日本語の文です。次の文です。"),
    ]


def test_what_has_no_sentences_is_cut(tmp_path: Path) -> None:
    assert split(tmp_path, "あ" * 130) == [("", "あ" * 60), ("", "あ" * 60), ("", "あ" * 10)]


def test_in_code_there_are_no_headings(tmp_path: Path) -> None:
    text = "# Install\n\nSo:\n\n```sh\n# the package\n\npip install it\n```\n\nDone."
    assert split(tmp_path, text) == [("Install", "So:\n\n```sh\n# the package\npip install it\n```\n\nDone.")]


@pytest.mark.parametrize("text", ["#hashtag of a text", "C# is a language", "#"])
def test_what_is_no_heading(text: str, tmp_path: Path) -> None:
    assert split(tmp_path, text) == [("", text)]


def test_windows_line_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeff# 題\r\n\r\n本文です。\r\n".encode())
    assert read_passages(tmp_path, longest=60) == [Passage("a.txt", "題", "本文です。")]


def test_documents_of_folders_in_the_order_of_names(tmp_path: Path) -> None:
    write(tmp_path, b_txt="B.", deep__a_MD="A.")
    (tmp_path / "deep/A.MD").write_text("Large.")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert [file.relative_to(tmp_path).as_posix() for file in document_files(tmp_path)] == ["b.txt", "deep/A.MD"]
    assert [each.source for each in read_passages(tmp_path, longest=60)] == ["b.txt", "deep/A.MD"]
    assert document_files(tmp_path / "missing") == []


def test_all_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    write(tmp_path, good_md="Good.")
    for name in ("a.txt", "b.md"):
        (tmp_path / name).write_bytes("日本".encode("shift_jis"))
    with pytest.raises(DocumentError) as caught:
        read_passages(tmp_path, longest=60)
    assert [line.split(":")[0].rpartition("/")[2] for line in str(caught.value).splitlines()[1:]] == ["a.txt", "b.md"]


@pytest.mark.parametrize("text", ["", " \n\n", "# Only a heading\n"])
def test_nothing_to_find_in(text: str, tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="has no text in any document"):
        read_passages(write(tmp_path, a_md=text), longest=60)
    with pytest.raises(DocumentError, match="hold no word"):
        PassageIndex([Passage("a.md", "", "…! 🗼")])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Q4_K_M's file: Config.YAML!", ["q4_k_m", "s", "file", "config.yaml"]),
        ("ディスク100GBの", ["ディ", "ィス", "スク", "100gb", "の"]),
        ("東京", ["東京"]),
        ("水", ["水"]),
        ("ＧＰＵ２枚", ["gpu2", "枚"]),
        ("ﾃﾞｨｽｸ", ["ディ", "ィス", "スク"]),
        ("안녕하세요 세계", ["안녕하세요", "세계"]),
        ("Straße", ["strasse"]),
        ("…", []),
    ],
)
def test_terms(text: str, found: list[str]) -> None:
    assert terms(text) == found


PASSAGES = [
    Passage("a.md", "Disk", "The direct path takes 20 GB beside the base."),
    Passage("a.md", "Memory", "A merge takes 3 GB, whatever the size of the model."),
    Passage("b.md", "検証", "このコマンドはファイルのsha256を調べます。"),
    Passage("b.md", "量子化", "既定の種類はQ4_K_Mで、変えられます。"),
]


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("How much disk is taken by the direct path?", PASSAGES[0]),
        ("How much memory does it take?", PASSAGES[1]),  # by the heading
        ("Explain SHA256.", PASSAGES[2]),
        ("量子化の既定の種類は何ですか？", PASSAGES[3]),
        ("ｑ４＿ｋ＿ｍとは？", PASSAGES[3]),
    ],
)
def test_the_best_passage_comes_first(question: str, expected: Passage) -> None:
    found = PassageIndex(PASSAGES).find(question, count=3)
    assert found[0] == expected
    assert len(found) == len(set(map(id, found))) <= 3


def test_more_than_there_are_and_none_that_fits() -> None:
    index = PassageIndex(PASSAGES)
    assert {each.heading for each in index.find("the", count=100)} == {"Disk", "Memory"}
    assert index.find("zebra", count=3) == index.find("?", count=3) == []
