"""The rebuild table: edit this, and exactly these rules would run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import yaml
from conftest import ROOT, copy_built, copy_checkout, planned_rules, run_snakemake, write_project
from tiny_adapter import CONFIG, WEIGHTS, write_constants

pytestmark = pytest.mark.slow

TARGETS = ("models/tiny.q4_k_m.gguf", "models/tiny.Modelfile", "reports/tiny.smoke.json")

# Each job is named by its rule and its first output; a chain is a job and all that follows from it.
MODELFILE = {("render_modelfile", "models/tiny.Modelfile")}
SMOKE = {("smoke_test", "reports/tiny.smoke.json")}
ASKED = {("check_questions", "work/tiny/questions.json"), *SMOKE}
QUANTIZED = {("quantize_gguf", "models/tiny.q4_k_m.gguf"), *MODELFILE, *SMOKE}
CONVERTED = {("convert_gguf", "models/tiny.f16.gguf"), *QUANTIZED}
MERGED = {("merge_adapter", "models/tiny/merged/MANIFEST.json"), *CONVERTED}
TRAINED = {("train_adapter", "adapters/tiny/MANIFEST.json"), *MERGED}
IMPORTED = {("import_adapter", "adapters/tiny/MANIFEST.json"), *MERGED}
CHECKED = {("check_data", "work/tiny/data.json"), *TRAINED}
BASE_QUANTIZED = {("quantize_gguf", "models/tiny.base.q4_k_m.gguf"), *SMOKE}
BASE_CONVERTED = {("convert_gguf", "models/tiny.base.f16.gguf"), *BASE_QUANTIZED}
FETCHED = {
    ("fetch_base", "bases/tiny/MANIFEST.json"), ("check_base", "work/tiny/base.json"), *TRAINED, *BASE_CONVERTED
}  # fmt: skip
CALIBRATED = {("check_calibration", "work/tiny/calibration.json")}
COMPUTED = {("compute_imatrix", f"models/tiny{base}.imatrix.gguf") for base in ("", ".base")}
Q5_K_M = {(rule, output.replace("q4_k_m", "q5_k_m")) for rule, output in QUANTIZED | BASE_QUANTIZED}


def planned_jobs(done: subprocess.CompletedProcess[str]) -> set[tuple[str, str]]:
    """Rule and first output of every job that a dry run lists; the rules are held against its table of jobs."""
    planned = planned_rules(done)
    jobs = re.findall(
        r"^(?:local)?rule (\w+):\n(?:    .+\n)*?    output: ([^,\s]+)", done.stdout + done.stderr, re.MULTILINE
    )
    assert {rule for rule, _ in jobs} == planned
    return set(jobs)


def plan(project: Path, checkout: Path, *targets: str) -> set[tuple[str, str]]:
    """What a dry run would do."""
    return planned_jobs(run_snakemake(project, "-n", *targets, checkout=checkout))


@pytest.fixture(scope="module")
def recorded(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    The built folder with a base inside, named by a relative path, so that the base of a copy can be changed.

    Snakemake's own --touch records the files as built; nothing is computed again.
    """
    project, checkout = copy_built(built, tmp_path_factory.mktemp("recorded") / "place")
    config = yaml.safe_load((project / "config.yaml").read_text(encoding="utf-8"))
    base = Path(config["models"]["tiny"]["base"]["path"])
    shutil.copytree(project / base, project / "tiny-llama", dirs_exist_ok=True)
    set_in_config("models", "tiny", "base", "path", value="tiny-llama")(project, checkout)
    touched = run_snakemake(project, "-j1", "--touch", *TARGETS, checkout=checkout)
    assert touched.returncode == 0, touched.stderr
    assert plan(project, checkout, *TARGETS) == set()
    return project


def set_in_config(*path: str, value: object) -> Callable[[Path, Path], None]:
    """An edit of one value of config.yaml."""

    def edit(project: Path, checkout: Path) -> None:
        config = yaml.safe_load((project / "config.yaml").read_text(encoding="utf-8"))
        section = config
        for key in path[:-1]:
            section = section.setdefault(key, {})
        section[path[-1]] = value
        (project / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")

    return edit


def merge_on_a_gpu(project: Path, checkout: Path) -> None:
    """The same bytes; nothing has to be built to see that."""
    set_in_config("hardware", "gpus", value=[24])(project, checkout)
    set_in_config("models", "tiny", "merge", "device", value="cuda")(project, checkout)


def replace_in_checkout(file: str, old: str, new: str) -> Callable[[Path, Path], None]:
    """An edit of the code."""

    def edit(project: Path, checkout: Path) -> None:
        text = (checkout / file).read_text(encoding="utf-8")
        assert old in text
        (checkout / file).write_text(text.replace(old, new, 1), encoding="utf-8")

    return edit


def change_a_line_of_data(project: Path, checkout: Path) -> None:
    path = project / "train.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("q4_k_m", "q5_k_m", 1), encoding="utf-8")


def ask_something_else(project: Path, checkout: Path) -> None:
    (project / "ask.jsonl").write_text('{"question": "Who?", "expect": [["snakemake"]]}\n')


def configure_a_matrix(project: Path, checkout: Path) -> None:
    tiny.write_text(project / "read.txt")
    set_in_config("models", "tiny", "quantize", "imatrix", value={"text": "read.txt"})(project, checkout)


def touch_every_script(project: Path, checkout: Path) -> None:
    for script in (checkout / "scripts").rglob("*.py"):
        os.utime(script)


def touch_the_data(project: Path, checkout: Path) -> None:
    os.utime(project / "train.jsonl")
    os.utime(project / "ask.jsonl")


def run_only(rule: str, output: str, project: Path, checkout: Path) -> None:
    """Run one rule for real, whatever else is planned."""
    before = (project / output).stat()
    done = run_snakemake(
        project, "-j1", "--until", rule, "--forcerun", rule, "--", output, checkout=checkout
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (project / output).stat().st_mtime_ns > before.st_mtime_ns


def convert_again(project: Path, checkout: Path) -> None:
    run_only("convert_gguf", "models/tiny.f16.gguf", project, checkout)


def flip_a_byte_of_the_base(project: Path, checkout: Path) -> None:
    shard = sorted((project / "tiny-llama").glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def flip_a_byte_of_the_base_and_list_it(project: Path, checkout: Path) -> None:
    flip_a_byte_of_the_base(project, checkout)
    run_only("fetch_base", "bases/tiny/MANIFEST.json", project, checkout)


def move_the_base(project: Path, checkout: Path) -> None:
    (project / "elsewhere").mkdir()
    (project / "tiny-llama").rename(project / "elsewhere/tiny-llama")
    set_in_config("models", "tiny", "base", "path", value="elsewhere/tiny-llama")(project, checkout)


def move_the_base_and_list_it(project: Path, checkout: Path) -> None:
    move_the_base(project, checkout)
    run_only("fetch_base", "bases/tiny/MANIFEST.json", project, checkout)


ANOTHER = {"base": {"hub": "someone/other", "revision": "main", "shape": tiny.SHAPE}}
TABLE = {
    "the Ollama system prompt": (
        set_in_config("models", "tiny", "ollama", "system", value="Be brief."),
        MODELFILE,
    ),
    "a temperature": (
        set_in_config("models", "tiny", "ollama", "parameters", "temperature", value=0.9),
        MODELFILE,
    ),
    "the quantization type": (
        set_in_config("models", "tiny", "quantize", "types", value=["q5_k_m"]),
        Q5_K_M,
    ),
    "the type of some tensors": (
        set_in_config("models", "tiny", "quantize", "tensor_type", value={"attn_v": "q8_0"}),
        QUANTIZED | BASE_QUANTIZED,
    ),
    "an importance matrix": (configure_a_matrix, CALIBRATED | COMPUTED | QUANTIZED | BASE_QUANTIZED),
    "the shard size": (set_in_config("models", "tiny", "merge", "max_shard_size", value=2), MERGED),
    "what the adapter is merged into": (set_in_config("models", "tiny", "merge", "base_weights", value="nf4"), MERGED),
    "where the merge is computed": (merge_on_a_gpu, set()),
    "the learning rate": (
        set_in_config("models", "tiny", "adapter", "train", "learning_rate", value=0.02),
        TRAINED,
    ),
    "one line of data": (change_a_line_of_data, CHECKED),
    "how a base is checked": (
        replace_in_checkout("scripts/check_base.py", '"--vocab-only"', '"--vocab-only", "--verbose"'),
        set(),
    ),
    "one byte of the base": (flip_a_byte_of_the_base, FETCHED),
    "one byte of the base, once it is listed": (
        flip_a_byte_of_the_base_and_list_it,
        FETCHED - {("fetch_base", "bases/tiny/MANIFEST.json")},
    ),
    "the same base at another path, once it is listed": (move_the_base_and_list_it, set()),
    "a held-out question": (ask_something_else, ASKED),
    "a helper that only the merge uses": (
        replace_in_checkout("scripts/lib/merge.py", "1 << 22", "1 << 21"),
        MERGED,
    ),
    "a comment in the trainer": (
        replace_in_checkout("scripts/lib/training.py", "def train_lora", "# A remark.\ndef train_lora"),
        set(),
    ),
    "a docstring in the trainer": (
        replace_in_checkout("scripts/lib/training.py", "    Train an adapter, from", "    Train one adapter, from"),
        set(),
    ),
    "a comment in the README": (replace_in_checkout("README.md", "modelmill", "<!-- a remark -->modelmill"), set()),
    "the time of every script": (touch_every_script, set()),
    "the time of the data and of the questions": (touch_the_data, set()),
    "another model's entry": (set_in_config("models", "other", value=ANOTHER), set()),
    "the machine planned for": (set_in_config("hardware", "gpus", value=[24, 24]), set()),
    "a forced conversion to the same bytes": (convert_again, set()),
}


@pytest.mark.parametrize("edited", TABLE)
def test_edit_reruns_exactly(edited: str, recorded: Path, tmp_path: Path) -> None:
    edit, expected = TABLE[edited]
    project, checkout = copy_built(recorded, tmp_path / "copy")
    edit(project, checkout)
    targets = [name.replace("q4_k_m", "q5_k_m") for name in TARGETS] if expected is Q5_K_M else TARGETS
    assert plan(project, checkout, *targets) == expected


def record_as_built(project: Path, jobs: set[tuple[str, str]], targets: tuple[str, ...] = TARGETS) -> None:
    """Put something in the place of each job's outputs, and let Snakemake's own --touch take it for built."""
    outputs = [output for _, output in jobs] + ["work/llama_cpp.json"]
    outputs += [f"{output}.json" for output in outputs if output.endswith(".gguf")]
    outputs += [
        "adapters/tiny/adapter_model.safetensors",
        "adapters/tiny/adapter_config.json",
        "reports/tiny.chat.json",
    ]
    for name in outputs:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("{}")
    touched = run_snakemake(project, "-j1", "--touch", "--forceall", *targets)
    assert touched.returncode == 0, touched.stderr
    assert plan(project, ROOT, *targets) == set()


def test_revision_of_a_hub_base_reruns_its_chain(tmp_path: Path, tiny_base: Path) -> None:
    """Snakemake's own --touch takes files as built; so no download is needed for this row."""
    project = write_project(tmp_path / "project", base=tiny_base)
    hub = {**ANOTHER, "adapter": {"train": tiny.TRAIN}, "smoke": {"questions": "ask.jsonl"}}
    set_in_config("models", "tiny", value=hub)(project, project)
    record_as_built(project, FETCHED | CHECKED | ASKED)
    set_in_config("models", "tiny", "base", "revision", value="v2")(project, project)
    assert plan(project, ROOT, *TARGETS) == FETCHED


def test_held_out_data_are_checked_and_train_again_when_edited(tmp_path: Path, tiny_base: Path) -> None:
    project = write_project(tmp_path / "project", base=tiny_base)
    shutil.copy(project / "train.jsonl", project / "held_out.jsonl")
    set_in_config("models", "tiny", "adapter", "train", "eval_data", value="held_out.jsonl")(project, project)
    record_as_built(project, FETCHED | CHECKED | ASKED)
    os.utime(project / "held_out.jsonl")
    assert plan(project, ROOT, *TARGETS) == set()
    (project / "held_out.jsonl").write_text('{"text": "something else"}\n')
    assert plan(project, ROOT, *TARGETS) == CHECKED
    (project / "held_out.jsonl").write_text("no json\n")
    done = run_snakemake(project, "-j1", "work/tiny/data.json")
    assert done.returncode == 1
    assert "held_out.jsonl:\n  line 1: no JSON" in (project / "logs/tiny/check_data.log").read_text()


@pytest.fixture(scope="module")
def recorded_import(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A project that takes the newest of two adapters, `runs/b`, recorded as built."""
    project = write_project(tmp_path_factory.mktemp("import") / "project", base=tiny_base)
    write_constants(project / "runs/a", written=1_700_000_000)
    write_constants(project / "runs/b", written=1_700_000_001)
    set_in_config("models", "tiny", "adapter", value={"latest_in": "runs"})(project, project)
    record_as_built(project, (FETCHED - TRAINED) | IMPORTED | ASKED)
    return project


@pytest.fixture
def imported(recorded_import: Path, tmp_path: Path) -> Path:
    """A copy of it, times included, to be edited."""
    return shutil.copytree(recorded_import, tmp_path / "project")


def new_adapter(name: str, *lost: str) -> Callable[[Path, Path], None]:
    """An edit: an adapter written now, some of its files yet to come."""

    def edit(project: Path, checkout: Path) -> None:
        write_constants(project / "runs" / name)
        for file in lost:
            (project / "runs" / name / file).unlink()

    return edit


def remove_the_newest_adapter(project: Path, checkout: Path) -> None:
    shutil.rmtree(project / "runs/b")


def touch_the_newest_adapter(project: Path, checkout: Path) -> None:
    for path in (project / "runs/b").iterdir():
        os.utime(path)


def change_the_older_adapter(project: Path, checkout: Path) -> None:
    write_constants(project / "runs/a", value=2.0, written=1_700_000_000)


IMPORT_TABLE = {
    "another adapter becomes the newest": (new_adapter("c"), IMPORTED),
    "the newest adapter is gone": (remove_the_newest_adapter, IMPORTED),
    "a newer one without its config yet": (new_adapter("c", CONFIG), set()),
    "a newer one without its weights yet": (new_adapter("c", WEIGHTS), set()),
    "a newer one in a hidden folder": (new_adapter(".c.partial"), set()),
    "the older one's weights": (change_the_older_adapter, set()),
    "the newest one's time": (touch_the_newest_adapter, set()),
    "the same bytes written again": (new_adapter("b"), set()),
    "the newest one's weights": (lambda project, _: write_constants(project / "runs/b", value=2.0), IMPORTED),
    "the newest one's config": (lambda project, _: write_constants(project / "runs/b", lora_alpha=8), IMPORTED),
    "the same adapter by its path": (set_in_config("models", "tiny", "adapter", value={"path": "runs/b"}), set()),
    "another adapter by its path": (set_in_config("models", "tiny", "adapter", value={"path": "runs/a"}), IMPORTED),
    "training instead": (set_in_config("models", "tiny", "adapter", value={"train": tiny.TRAIN}), CHECKED),
}


@pytest.mark.parametrize("edited", IMPORT_TABLE)
def test_edit_of_an_imported_adapter_reruns_exactly(edited: str, imported: Path) -> None:
    edit, expected = IMPORT_TABLE[edited]
    edit(imported, ROOT)
    assert plan(imported, ROOT, *TARGETS) == expected


def test_a_link_to_another_older_adapter_is_noticed(imported: Path) -> None:
    (imported / "chosen").symlink_to("runs/b")
    set_in_config("models", "tiny", "adapter", value={"path": "chosen"})(imported, ROOT)
    assert run_snakemake(imported, "-j1", "--touch", "--forceall", *TARGETS).returncode == 0
    assert plan(imported, ROOT, *TARGETS) == set()
    (imported / "chosen").unlink()
    (imported / "chosen").symlink_to("runs/a")
    assert plan(imported, ROOT, *TARGETS) == IMPORTED


TALK = ("ollama/tiny.json", "reports/tiny.rag.json", "models/tiny.adapter.Modelfile")
REGISTERED = {("register_model", "ollama/tiny.json")}
ANSWERED = {("answer_from_documents", "reports/tiny.rag.json")}
DOCUMENTED = {("check_documents", "work/tiny/documents.json"), *ANSWERED}
WITH_ADAPTER = {("render_modelfile", "models/tiny.adapter.Modelfile")}
TALKED = {*MODELFILE, *REGISTERED, *ANSWERED, *WITH_ADAPTER}
TUNED = {("quantize_gguf", "models/tiny.q4_k_m.gguf"), *MODELFILE, *REGISTERED, *ANSWERED}


@pytest.fixture(scope="module")
def recorded_talk(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A project whose model is registered and asked about documents, recorded as built."""
    project = write_project(tmp_path_factory.mktemp("talk") / "project", base=tiny_base)
    (project / "notes").mkdir()
    (project / "notes/a.md").write_text("Snakemake builds the model.\n")
    rag = {"documents": "notes", "questions": "ask.jsonl"}
    set_in_config("models", "tiny", "rag", value=rag)(project, project)
    made = (FETCHED - SMOKE) | DOCUMENTED | TUNED | WITH_ADAPTER | {("check_questions", "work/tiny/questions.json")}
    record_as_built(project, made | {("convert_adapter", "models/tiny.adapter.gguf")}, TALK)
    return project


def change_a_document(project: Path, checkout: Path) -> None:
    (project / "notes/a.md").write_text("Make builds the model.\n")


def add_a_document(project: Path, checkout: Path) -> None:
    (project / "notes/b.txt").write_text("It runs on Linux.\n")


def touch_the_documents(project: Path, checkout: Path) -> None:
    os.utime(project / "notes/a.md")


def add_a_picture(project: Path, checkout: Path) -> None:
    (project / "notes/b.png").write_bytes(b"")


TALK_TABLE = {
    "the system prompt": (set_in_config("models", "tiny", "ollama", "system", value="Be brief."), TALKED),
    "a temperature": (
        set_in_config("models", "tiny", "ollama", "parameters", "temperature", value=0.9),
        TALKED - ANSWERED,
    ),
    "the name in Ollama": (set_in_config("models", "tiny", "ollama", "name", value="me/tiny"), REGISTERED | ANSWERED),
    "the prompt of passages": (
        set_in_config("models", "tiny", "rag", "prompt", value="{passages} {question}"),
        ANSWERED,
    ),
    "a document": (change_a_document, DOCUMENTED),
    "one more document": (add_a_document, DOCUMENTED),
    "the time of a document": (touch_the_documents, set()),
    "a picture among the documents": (add_a_picture, set()),
    "how passages are found": (
        replace_in_checkout("scripts/lib/documents.py", 'ENDINGS = (".md", ".txt")', 'ENDINGS = (".txt", ".md")'),
        DOCUMENTED,
    ),
    "how blobs are sent": (
        replace_in_checkout("scripts/lib/ollama_server.py", "PIECE_BYTES = 1 << 20", "PIECE_BYTES = 1 << 19"),
        REGISTERED | ANSWERED,
    ),
    "how an adapter becomes a GGUF": (
        replace_in_checkout("scripts/convert_adapter.py", "rel_tol=1e-6", "rel_tol=1e-7"),
        {("convert_adapter", "models/tiny.adapter.gguf"), *WITH_ADAPTER},
    ),
}


@pytest.mark.parametrize("edited", TALK_TABLE)
def test_edit_of_how_it_is_talked_to_reruns_exactly(edited: str, recorded_talk: Path, tmp_path: Path) -> None:
    edit, expected = TALK_TABLE[edited]
    project = shutil.copytree(recorded_talk, tmp_path / "project")
    checkout = copy_checkout(tmp_path / "checkout")
    edit(project, checkout)
    assert plan(project, checkout, *TALK) == expected
