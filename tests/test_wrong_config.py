"""Configs that cannot be built: what is told names the key and the remedy, all of it in one run, and no traceback."""

from __future__ import annotations

import copy
import datetime
import itertools
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import run_snakemake
from tiny import SHAPE
from tiny_adapter import CONFIG, WEIGHTS, write_constants
from wrong_configs import GOOD, TABLE, VIT

from lib.config import ConfigError, as_yaml, with_defaults
from lib.config_file import ConfigFileError, read_project
from lib.spec import resolve_project


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that configs name, good and bad ones."""
    monkeypatch.chdir(tmp_path)
    texts = {
        "talks.jsonl": "{}\n",
        "asked.jsonl": "{}\n\n{}\n",
        "read.txt": "A sentence.\n" * 200,
        "other.txt": "Another one.\n" * 200,
        "empty.txt": "",
        "notes/a.md": "Text.",
        "braced/good.md": "Text.",
        "braced/a{b}.md": "Text.",
        "folder/picture.png": "",
        "own/config.json": json.dumps(SHAPE),
        "damaged/config.json": "{damaged",
        "negative/config.json": json.dumps({**SHAPE, "num_hidden_layers": -2}),
        **{f"{made}/config.json": json.dumps(SHAPE) for made in ("models/m/merged", "models/n/merged", "bases/m")},
        "models/m.f16.gguf": "GGUF",
        "models/t/merged/config.json": json.dumps(yaml.safe_load(VIT)),
        "backbone/config.json": json.dumps(yaml.safe_load(VIT)),
        "stages/config.json": json.dumps({"model_type": "convnext", "depths": [1], "hidden_sizes": [8]}),
        **{f"tennis/game{number}/Clip1/Label.csv": "" for number in (1, 2)},
    }
    for name, text in texts.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
    for folder in ("given", "adapters/m", "bare", "pickled"):
        write_constants(Path(folder))
    Path("bare", CONFIG).unlink()
    Path("pickled", WEIGHTS).rename(Path("pickled", WEIGHTS.replace(".safetensors", ".bin")))
    os.symlink("loop", "loop")
    os.mkfifo("pipe")
    return tmp_path


def broken(lines: str) -> dict[str, Any]:
    """GOOD, with the values of these lines at their dotted places."""
    config = yaml.safe_load(GOOD)
    for line in lines.split("\n"):
        path, _, value = line.partition(":")
        path = path.replace("train", "m.adapter.train", 1) if path.startswith("train") else path
        *parents, last = ("models." + path if path.startswith("m.") else path).split(".")
        place = config
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = yaml.safe_load(value)
    return config


def told(config: object = None, *, text: str | bytes | None = None, **changes: Any) -> list[str]:
    """
    What is said of a config, line by line: of the file and of the command line, read as the workflow reads them.

    Args:
        config: written to config.yaml, unless its `text` is given.
        changes: as --config hands them over.
    """
    text = yaml.safe_dump(config, allow_unicode=True) if text is None else text
    Path("config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((ConfigError, ConfigFileError)) as refused:
        read_project([Path("config.yaml")], as_yaml(changes))
    title, *lines = str(refused.value).splitlines()
    return [line.strip() for line in lines] if title == "config.yaml:" else [title, *lines]


def test_the_good_config_is_good() -> None:
    """So that each row is refused for what it says alone."""
    Path("config.yaml").write_text(GOOD)
    assert read_project([Path("config.yaml")], {}).models.keys() == {"m"}
    assert len(TABLE) >= 150


@pytest.mark.parametrize("mistake", TABLE)
def test_the_key_and_the_remedy_are_told(mistake: str) -> None:
    lines, remedy, *named = TABLE[mistake]
    key = named[0] if named else lines.partition(":")[0]
    key = key.replace("train", "m.adapter.train", 1) if key.startswith("train") else key
    key = f"models.{key}" if key.partition(".")[0] == "m" else key
    (line,) = told(broken(lines))
    assert line.startswith(f"{key}: " if key else "unknown key ")
    assert remedy in line


# what: (the whole file; what is said first)
FILES: dict[str, tuple[str | bytes, str]] = {
    "nothing": ("", "config.yaml: is empty; name at least one model under 'models'"),
    "comments": ("# models:\n", "config.yaml: is empty; "),
    "a list": ("- m\n", "config.yaml: expected keys with values, as in 'models:', found ['m']"),
    "a text": ("models", "config.yaml: expected keys with values, as in 'models:', found 'models'"),
    "tabs": ("models:\n\tm: {}\n", "config.yaml, line 2, column 1: is no YAML: "),
    "an open bracket": ("hardware: {gpus: [24}\n", "config.yaml, line 1, column 21: is no YAML: "),
    "two documents": ("models: {}\n---\nmodels: {}\n", "config.yaml, line 2, column 1: is no YAML: "),
    "a template": ("models: {{models}}\n", "config.yaml, line 1, column 10: is no YAML: found unhashable key"),
    "an unknown alias": ("models: *m\n", "config.yaml, line 1, column 9: is no YAML: found undefined alias"),
    "an anchor in itself": ("models: &m\n  m: *m\n", "config.yaml, line 1: what stands here contains itself; take "),
    "Python's objects": ("models: !!python/object:os.x {}\n", "config.yaml, line 1, column 9: is no YAML: could not "),
    "a date that is none": ("models: 2026-13-45\n", "config.yaml: holds a value that cannot be: month must be "),
    "a number without end": (f"models: {'9' * 5000}", "config.yaml: holds a value that cannot be: Exceeds the limit"),
    "thousands of brackets": ("[" * 20_000, "config.yaml: is nested too deeply"),
    "Latin-1": (
        "models: {é: 1}".encode("latin-1"),
        "config.yaml: is no UTF-8 text (invalid continuation byte at byte 9",
    ),
    "a zero byte": ("models: a\0b", "config.yaml: is no YAML: unacceptable character #x0000"),
    "a model twice": (
        f"{GOOD}  m: {{base: {{path: own}}}}\n",
        "config.yaml: models.m: stands twice, in line 4 and in ",
    ),
    "a key twice in a line": ("hardware: {ram: 1, ram: 2}", "config.yaml: hardware.ram: stands twice, in line 1 and"),
    "a model by two kinds of key": (f"{GOOD}  1: {{}}\n  '1': {{}}\n", "models: the key 1 is no text; write it in "),
}


@pytest.mark.parametrize("content", FILES)
def test_a_file_that_is_no_config(content: str) -> None:
    text, said = FILES[content]
    assert told(text=text)[0].startswith(said)
    if "tabs" in content:
        assert told(text=text)[0].endswith("; indent with spaces, not with tabs")


@pytest.mark.parametrize(
    ("name", "said"),
    [("absent.yaml", "there is no such file; name another with --configfile"), ("folder", "cannot be read: Is a d")],
)
def test_a_config_that_cannot_be_read(name: str, said: str) -> None:
    with pytest.raises(ConfigFileError, match=f"^{name}: {said}"):
        read_project([Path(name)], {})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"models": 5}, "models: expected mapping, found integer 5; keys with values belong there"),
        ({"models": {"m": None}}, "models.m: expected mapping, found null; give it a value, or take the key out"),
        ({"hardware": {"gpus": "24,24"}}, "hardware.gpus: expected list, found string '24,24'; write it as a list"),
        ({"hardware": {"gpus": ["24", "many"]}}, "hardware.gpus.1: expected number, found string 'many'; write a num"),
        ({"force": "maybe"}, "force: expected boolean, found string 'maybe'; write true or false"),
        ({"keep_intermediate": "false"}, "unknown key 'keep_intermediate'; did you mean 'keep_intermediates'?"),
        ({"models": {"m": {"merge": {"dtype": "2026-01-02"}}}}, "models.m.merge.dtype: 2026-01-02 is none of float16"),
    ],
)
def test_what_the_command_line_breaks(changes: dict[str, Any], said: str) -> None:
    (line,) = told(yaml.safe_load(GOOD), **changes)
    assert line.startswith(said)


def test_bases_in_a_circle() -> None:
    lines = {"m.base": "{path: bases/n}", "models.n": "{base: {path: models/m/merged}}"}
    Path("bases/n").mkdir()
    Path("bases/n/config.json").write_text(json.dumps(SHAPE))
    assert told(broken("\n".join(f"{place}: {value}" for place, value in lines.items()))) == [
        "models.m.base.path: bases/n is made from m itself (m from n from m); name the original base",
        "models.n.base.path: models/m/merged is made from n itself (n from m from n); name the original base",
    ]


def test_a_base_that_another_model_fetched_can_be_shared() -> None:
    Path("config.yaml").write_text(f"{GOOD}  n: {{base: {{path: bases/m}}}}\n")
    assert read_project([Path("config.yaml")], {}).models["n"].base.path == "bases/m"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_file_of_somebody_else(tmp_path: Path) -> None:
    Path("talks.jsonl").chmod(0o600)
    config = broken("train.seed: 1")
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o777)
    os.seteuid(65534)
    try:
        (line,) = told(config)
    finally:
        os.seteuid(0)
    assert line == "models.m.adapter.train.data: 'talks.jsonl' cannot be read: Permission denied"


def test_incomplete_adapters_are_listed() -> None:
    assert told(broken("m.adapter: {latest_in: pickled}")) == [
        "models.m.adapter.latest_in: no complete adapter under pickled",
        f"pickled: adapter_model.bin is pickled and can run code when read; save the adapter as {WEIGHTS}",
    ]


# Values that have broken one thing or another, wherever they stand.
NASTY: list[Any] = [
    None, True, -1, 0.5, 10**400, 2**70, float("nan"), float("inf"), 1e300, "", " ", "\0", "\n", "..", "~", "{a}",
    "\ud800", "x" * 5000, "/dev/null", "/proc/self/mem", [], [None], [[1]], ["a", "a"], {}, {1: 2}, {None: None},
    {"x": {"y": [1]}}, datetime.date(2026, 1, 2), b"x", {"a", "b"},
]  # fmt: skip
FULL = [
    "m.ollama: {messages: [{role: user, content: a}], parameters: {stop: [END], num_ctx: 10, temperature: 0.1}}",
    "m.quantize: {imatrix: {text: read.txt}, tensor_type: {attn_v: q8_0}}",
    "m.quality: {text: other.txt, general_text: read.txt, types: [q8_0], max_kld: 0.1, min_top1: 0.9}",
    "train.offload: {max_memory: {'0': 20GiB}}",
    f"models.p: {{base: {{hub: a/b, revision: main, shape: {json.dumps(SHAPE)}}}, adapter: {{path: given}}}}",
    f"models.l: {{base: {{hub: a/b, revision: main, shape: {json.dumps(SHAPE)}}}, adapter: {{latest_in: given}}}}",
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*path, key)
        yield from places(entry, (*path, key))


def test_whatever_stands_anywhere_is_refused_in_words() -> None:
    """300 of some 8000, the same each time; with defaults every key is there."""
    good = with_defaults(broken("\n".join(FULL)))
    for model in good["models"].values():  # exactly one of these may stand there
        model["adapter"] = {key: value for key, value in model["adapter"].items() if value is not None}
    resolve_project(good)
    trials = random.Random(6).sample(list(itertools.product(places(good), NASTY)), 300)
    refused = 0
    for path, value in trials:
        config = copy.deepcopy(good)
        place = config
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        try:
            resolve_project(config)
        except ConfigError as error:
            refused += 1
            said = [line for line in str(error).splitlines()[1:] if path[0] in line or "key" in line]
            assert said, (path, value, str(error))
    assert refused > 200


# Of every kind and place; what depends on a section that is refused is not guessed at.
MANY = [
    "hardwear: {}",
    "hardware.ram: 48GB",
    "keep_intermediates: 1",
    "llama_cpp.path: gone",
    "train.lora.rank: 8",
    "train.lora.r: 0",
    "m.merge.dtype: fp16",
    "m.quantize.types: [q4km, iq2_xxs]",
    "m.ollama.system: 'Say \"so\"'",
    "m.smoke.questions: nothing.jsonl",
    "m.rag.documents: folder",
    "models.n: {base: {path: absent}, adapter: {train: {data: gone.jsonl, eval_data: none.jsonl}}, ollama: {name: m}}",
    "models.o: {base: {hub: a/b}}",
]
ALL = [
    "unknown key 'hardwear'", "hardware.ram: ", "keep_intermediates: ", "llama_cpp.path: ",
    "models.m.adapter.train.lora: unknown key 'rank'", "models.m.adapter.train.lora.r: ", "models.m.merge.dtype: ",
    "models.m.quantize.types: unknown type 'q4km'", "models.m.quantize.types: iq2_xxs needs",
    "models.m.ollama.system: ", "models.m.smoke.questions: ",
    "models.m.rag.documents: ", "models.n.base.path: ", "models.n.adapter.train.data: ",
    "models.n.adapter.train.eval_data: ", "models.n.ollama.name: m:latest is models.m's already",
    "models.o.base: 'revision'", "models.o.base: 'shape'",
]  # fmt: skip


def test_all_mistakes_are_told_in_one_run() -> None:
    lines = told(broken("\n".join(MANY)))
    assert {start: sum(line.startswith(start) for line in lines) for start in ALL} == dict.fromkeys(ALL, 1)
    assert len(lines) == len(ALL)


def workflow(folder: Path, *arguments: str) -> list[str]:
    """What the workflow itself says of the config in a folder, where the user sees it."""
    done = run_snakemake(folder, "-n", *arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and '  File "' not in done.stderr, done.stderr
    return [line.strip() for line in done.stderr.splitlines()]


def test_the_workflow_tells_all_of_it_and_no_traceback(tmp_path: Path) -> None:
    Path("config.yaml").write_text(yaml.safe_dump(broken("\n".join(MANY))) + "force: true\nforce: false\n")
    lines = workflow(tmp_path, "--config", "keep_intermediates=2")
    assert lines.index("config.yaml:") == len(lines) - len(ALL) - 2
    for start in [*ALL, "config.yaml: force: stands twice", "keep_intermediates: expected boolean, found integer 2"]:
        assert sum(line.startswith(start) for line in lines) == 1


def test_the_workflow_tells_where_a_file_is_no_yaml(tmp_path: Path) -> None:
    Path("config.yaml").write_bytes(FILES["a date that is none"][0].encode())
    assert workflow(tmp_path)[-1].startswith(FILES["a date that is none"][1])
