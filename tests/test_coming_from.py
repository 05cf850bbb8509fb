"""docs/coming-from.md: every command in it runs, every setting in it exists, and its figures are ours."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import forked_script
import heatmap_runs
import pytest
import tiny
import yaml
from conftest import ROOT, copy_built, planned_rules, run_snakemake
from fake_ollama import FakeOllama, fake_ollama
from tiny_adapter import write_constants

from lib import estimate
from lib.cli import UsageError
from lib.config import as_yaml, mistakes_in, schema
from lib.gguf_file import count_types, read_gguf
from lib.preflight import planned_machine, preflight
from lib.set_option import parse_settings, place_of
from lib.sizes import cache_bytes
from lib.spec import resolve_project

TEXT = (ROOT / "docs/coming-from.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
MEASURED = (ROOT / "docs/measurements.md").read_text(encoding="utf-8")
PROGRAMS = ("python", "snakemake", "tensorboard", "make", "ollama", "uv", "pip")
SPAN = re.compile(r"`([^`]+)`")
SETTING = re.compile(r"([a-z_]+(?:\.[a-z0-9_]+)+)(?:: (.+))?")
# What both documents name, and the document here has to map.
THEIRS = """
    qlora_to_ollama.py unified_model_processor.py memory_optimized_loader.py lora_finetuning.py
    validate_32b_quantization.py use_qlora qlora_4bit base_model_loading merge_dtype final_format low_cpu_mem_usage
    offload_folder max_memory llm_int8_enable_fp32_cpu_offload device_map --training --model --data tensorboard
    enabled load_in_8bit load_in_4bit llm_int8_threshold llm_int8_has_fp16_weight llm_int8_skip_modules
    bnb_4bit_compute_dtype bnb_4bit_use_double_quant bnb_4bit_quant_type r lora_alpha lora_dropout target_modules
    bias task_type batch_size epochs precision lr gradient_checkpointing use_cpu_offload use_disk_offload
    adaptive_micro_batch min_micro_batch_size mb_backoff_factor oom_retries memory/allocated_gb memory/cached_gb
    train/loss bitsandbytes peft accelerate vit_heatmap convnext_fpn_heatmap
""".split()


def rows(text: str) -> Iterator[list[str]]:
    """The cells of every row of the tables in a text, but for their heads."""
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("| ---"):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def outside_their_columns() -> str:
    """The text without code blocks and without the first column of tables, which quotes the documents."""
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    lines = [line.partition(" | ")[2] if line.startswith("| ") else line for line in prose.splitlines()]
    return "\n".join(lines)


def find_commands() -> list[str]:
    """Every command that the document gives, in order."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL))
    given = [line.partition(" #")[0].strip() for line in blocks.splitlines() if line.strip()]
    given += [span for span in SPAN.findall(outside_their_columns()) if span.split()[0] in PROGRAMS]
    return list(dict.fromkeys(given))


COMMANDS = find_commands()
KINDS = ("model", "heatmap_model")
SMALL_HEATMAP = ["--input-size", "96", "48", "--heatmap-size", "48", "24"]
LEAST = {"models": {"m": {"base": {"path": "base"}}}}


@pytest.fixture(scope="module")
def server() -> Iterator[FakeOllama]:
    with fake_ollama() as state:
        yield state


@pytest.fixture(scope="module")
def place(built: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which `mine` is the built tiny model, and an adapter lies where the report has its own."""
    folder, checkout = copy_built(built, tmp_path_factory.mktemp("coming") / "from")
    for part in checkout.iterdir():
        (folder / part.name).symlink_to(part)
    write_constants(folder / "outputs/lora_xxxxx", value=0.01, base_model_name_or_path=str(tiny_base))
    (folder / "bases/mine").symlink_to(tiny_base)
    (folder / "data").mkdir()
    heatmap_runs.write_base(folder / "bases/tennis")
    heatmap_runs.write_base(folder / "bases/convnext", "convnext")
    heatmap_runs.write_clips(folder / "data/tracknet")
    tiny.write_data(folder / "data/mine.jsonl", repeats=2)
    (folder / "notes").mkdir()
    (folder / "notes/a.md").write_text("Snakemake builds the model.\n")
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    config["models"]["tiny"]["rag"] = {"documents": "notes", "questions": "ask.jsonl", "max_tokens": 8}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    return folder


def run(place: Path, server: FakeOllama, *words: str) -> subprocess.CompletedProcess[str]:
    """Run in the checkout, by the interpreter of the tests and with the programs beside it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OLLAMA_HOST": server.url}
    words = (sys.executable if words[0] == "python" else words[0], *words[1:])
    return subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)


def train(place: Path, words: list[str]) -> None:
    """One update on the CPU, in a process that need not import torch anew."""
    options = [*words[2:], "--device=cpu", "--max-steps=1", "--max-length=64"]
    output = place / f"{Path(words[words.index('--output') + 1]).name}.txt"
    status, said = forked_script.run_script("train_adapter.py", *options, output=output, before=os.chdir, path=place)
    assert status == 0, said
    config = json.loads((place / words[words.index("--output") + 1] / "adapter_config.json").read_text())
    manifest = json.loads((place / words[words.index("--output") + 1] / "MANIFEST.json").read_text())
    assert manifest["origin"]["settings"]["method"] == words[words.index("--method") + 1]
    assert config["r"] == (int(words[words.index("--r") + 1]) if "--r" in words else 16)


def train_heatmap(place: Path, words: list[str]) -> None:
    """One update on the CPU, likewise."""
    folder = words[words.index("--output") + 1]
    options = [*words[2:], "--device=cpu", "--max-steps=1", *SMALL_HEATMAP]
    output = place / f"{Path(folder).name}.txt"
    status, said = forked_script.run_script("train_heatmap.py", *options, output=output, before=os.chdir, path=place)
    assert status == 0, said
    manifest = json.loads((place / folder / "MANIFEST.json").read_text())
    settings = manifest["origin"]["settings"]
    assert settings["method"] == words[words.index("--method") + 1]
    assert settings["model"] == words[words.index("--model") + 1]
    assert settings["lora"]["r"] == (int(words[words.index("--r") + 1]) if "--r" in words else 16)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_runs(command: str, place: Path, server: FakeOllama) -> None:
    """The 32B as a dry run; everything else, where the document says `mine`, on the tiny model."""
    words = shlex.split(command)
    if words[0] == "snakemake" and "deepseek32b" in command:
        assert planned_rules(run_snakemake(ROOT, *words[1:], "--dry-run", "--forceall"))
        return
    if words[:2] == ["python", "scripts/train_adapter.py"]:
        train(place, words)
        return
    if words[:2] == ["python", "scripts/train_heatmap.py"]:
        train_heatmap(place, words)
        return
    known = {
        "python scripts/compare_heatmaps.py",
        "python scripts/build_model.py",
        "python scripts/preflight.py",
        "python scripts/compare_methods.py",
    }
    assert words[0] in ("snakemake", "tensorboard") or " ".join(words[:2]) in known, "nothing here runs this command"
    changed = {"mine": "tiny"} if words[0] in ("snakemake", "tensorboard") or "--like" in words else {}
    words = [re.sub(r"\bmine\b", changed.get("mine", "mine"), word) for word in words]
    words += {
        "tensorboard": ["--inspect"],  # else it would serve for ever
        "scripts/compare_methods.py": ["--methods=lora", "--max-steps=2", "--save-steps=0", "--max-length=64"],
        "scripts/compare_heatmaps.py": ["--methods=full", "--max-steps=1", "--device=cpu", *SMALL_HEATMAP],
        "scripts/preflight.py": ["--config", str(ROOT / "config.yaml")],
    }.get(words[1] if words[0] == "python" else words[0], [])
    done = run(ROOT if words[1:2] == ["scripts/preflight.py"] else place, server, *words)
    assert done.returncode == 0, done.stderr
    if words[0] == "tensorboard":
        assert {"memory/allocated_gb", "memory/cached_gb", "train/loss"} <= set(done.stdout.split())
    for word in words:
        assert words[0] != "snakemake" or "/" not in word or (place / word).is_file()


def test_there_are_commands_for_each_of_theirs() -> None:
    assert len(COMMANDS) > 15
    for program in ("build_model.py", "preflight.py", "train_adapter.py", "train_heatmap.py", "tensorboard"):
        assert any(program in command for command in COMMANDS), program


def test_the_readme_gives_some_of_them() -> None:
    given = re.findall(r"^(python scripts/build_model\.py .*?)\s*(?:#.*)?$", README, re.MULTILINE)
    assert given and set(given) <= set(COMMANDS)


@pytest.mark.slow
def test_the_newest_adapter_came_to_a_modelfile_and_to_ollama(place: Path, server: FakeOllama) -> None:
    """What the report's first command did; run again, there is nothing to do."""
    done = run(place, server, "python", "scripts/build_model.py", "--adapter", "latest", "--ollama")
    assert done.returncode == 0, done.stderr
    assert "Nothing to be done" in done.stderr
    gguf = place / "models/lora_xxxxx.q4_k_m.gguf"
    assert count_types(read_gguf(gguf)) == {"F32": 5, "Q4_K": 13, "Q6_K": 3}
    assert (place / "models/lora_xxxxx.Modelfile").read_text().startswith("FROM ./lora_xxxxx.q4_k_m.gguf\n")
    assert "lora_xxxxx:latest" in server.models
    receipt = json.loads((place / "ollama/lora_xxxxx.json").read_text())
    assert receipt["weights"]["sha256"] == json.loads(gguf.with_name(f"{gguf.name}.json").read_text())["sha256"]
    assert done.stdout.endswith("with Ollama:\n  ollama run lora_xxxxx\n")
    manifest = json.loads((place / "adapters/lora_xxxxx/MANIFEST.json").read_text())
    assert manifest["origin"]["name"] == "lora_xxxxx"
    verify = run(place, server, "python", "scripts/verify.py", str(gguf), "adapters/lora_xxxxx")
    assert verify.returncode == 0, verify.stderr


def test_everything_of_theirs_is_mapped() -> None:
    quoted = " ".join([*(row[0] for row in rows(TEXT)), *SPAN.findall(outside_their_columns())])
    assert [word for word in THEIRS if not re.search(rf"(?<![\w-]){re.escape(word)}(?!\w)", quoted)] == []


def settings_in(text: str) -> list[tuple[str, str | None]]:
    """Our settings that a text names, with the values that it gives them."""
    ours = {*schema()["properties"]} | {key for kind in KINDS for key in schema()["$defs"][kind]["properties"]}
    found = [named for span in SPAN.findall(text) if (named := SETTING.fullmatch(span))]
    return [(named[1], named[2]) for named in found if named[1].split(".")[0] in ours]


@pytest.mark.parametrize(("path", "value"), sorted(set(settings_in(outside_their_columns())), key=str))
def test_the_setting_exists_and_takes_that_value(path: str, value: str | None) -> None:
    first, _, rest = path.partition(".")
    if first in schema()["properties"]:
        assert mistakes_in({**LEAST, first: {rest: as_yaml(value)}} if value else LEAST, schema()) == []
        assert rest in schema()["properties"][first]["properties"]
        return
    section = "model"
    try:
        place_of(path, section=section)
    except UsageError:
        section = "heatmap_model"
    if value is None:
        place_of(path, section=section)
    else:
        assert parse_settings([f"{path}={value}"], section=section)


def test_every_setting_of_theirs_has_one_of_ours() -> None:
    tables = re.findall(r"### Settings\n(.*?)(?=\n[^|\n])", TEXT, re.DOTALL)
    assert len(tables) == 2
    for theirs, ours in (row for table in tables for row in list(rows(table))[1:]):
        assert settings_in(ours) or "requirements.txt" in ours, theirs


def test_the_recommended_settings_are_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    project = resolve_project(yaml.safe_load(re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL)[1]))
    model = project.models["deepseek32b"]
    shipped = resolve_project(yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8")))
    assert (project.hardware, model.base) == (shipped.hardware, shipped.models["deepseek32b"].base)
    train = model.adapter.train
    assert (train.method, train.quantization.bnb_4bit_quant_type, train.lora.r) == ("qlora", "nf4", 16)
    assert (model.merge.dtype, model.quantize.types) == ("float16", ("q4_k_m",))


def test_16_bits_that_do_not_fit_are_told_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the report tries them and falls back: the recommended settings, with the method written by hand."""
    config = yaml.safe_load(re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL)[1])
    monkeypatch.chdir(ROOT)
    for method, fits in (("auto", True), ("lora", False)):
        config["models"]["deepseek32b"]["adapter"]["train"]["method"] = method
        project = resolve_project(config)
        plan = preflight("deepseek32b", project, planned_machine(project.hardware))
        (row,) = [row for row in plan.rows if row.step == "train_adapter"]
        assert row.fits == fits and (fits or row.advice[0] == "train.method: qlora")


def test_figures_are_those_of_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    model = resolve_project(yaml.safe_load((ROOT / "config.yaml").read_text())).models["deepseek32b"]
    shape, said = estimate.shape_of(model), {row[0]: row[-1] for row in rows(TEXT)}
    for title, kind in (("FP32", "fp32"), ("FP16", "fp16"), ("INT8", "int8"), ("4-bit", "4-bit")):
        (cell,) = [row[2] for row in rows(TEXT) if row[0] == title and row[1].endswith(" GB")]
        assert cell == f"{estimate.held_bytes(shape, kind) / 1e9:.1f} GB"
    assert said["the adapter, disk"] == f"{estimate.adapter_bytes(model) / 1e9:.1f} GB"
    assert said["GGUF conversion, disk"].startswith(f"{estimate.weight_bytes(model, 'f16') / 1e9:.1f} GB;")
    size, cache = estimate.weight_bytes(model, "q4_k_m"), cache_bytes(shape, 8192)
    assert said["running it in Ollama"].startswith(f"{size / 1e9:.1f} GB, and {cache / 1e9:.1f} GB for a context")


# What the guide's table came to when it was measured: language models, and heatmap models.
COMPARED = re.findall(r"\| method \|.*?\n\n", TEXT, re.DOTALL)


def test_measured_figures_are_in_the_measurements() -> None:
    measured = [cell for row in rows(TEXT) for cell in row if "*measured*" in cell]
    compared = re.sub(r"\([^)]*\)", "", "\n".join(COMPARED))
    figures = re.findall(r"([\d.,]+)(?= GB| s\b| tokens/s| frames/s| \+)", "\n".join(measured) + compared)
    assert len(figures) > 20
    for figure in figures:
        assert re.search(rf"(?<![\d.,]){re.escape(figure)}(?![\d]|[.,]\d)", MEASURED), figure


def test_shares_are_those_of_the_figures() -> None:
    languages, _ = COMPARED
    cells = [[_numbers(cell) for cell in row[2:]] for row in list(rows(languages))[1:]]
    for column in range(2):
        (memory, speed), *others = (row[column] for row in cells)
        for gb, percent, rate, times in others:
            assert (percent, times) == (round(100 * gb / memory), round(rate / speed, 2))


def test_shares_of_heatmap_models_are_those_of_the_measurements() -> None:
    _, heatmaps = COMPARED
    section = MEASURED.partition("\n## Heatmap models compared\n")[2].partition("\n## ")[0]
    runs = {tuple(row[:2]): row[2:] for row in rows(section) if len(row) == 7}
    checkpointed = {tuple(row[:2]): row[5] for row in rows(MEASURED) if row[2:5] == ["bf16", "16", "yes"]}

    def figures(backbone: str, method: str) -> tuple[float, float, float, float]:
        memory, speed, _, f1, _ = map(float, runs[backbone, method])
        return memory, float(checkpointed[backbone, method]), speed, f1

    header, *methods = list(rows(heatmaps))
    assert [row[0] for row in methods] == ["FP16", "int8", "QLoRA"]
    for column, backbone in ((2, "ViT-S/16"), (3, "ConvNeXt-B")):
        assert header[column].startswith(backbone)
        memory, least, speed, _ = whole = figures(backbone, "full")
        assert _numbers(methods[0][column]) == list(whole)
        for row in methods[1:]:
            each = figures(backbone, row[0].lower())
            shares = [round(100 * each[0] / memory), round(100 * each[1] / least), round(each[2] / speed, 2), each[3]]
            assert _numbers(row[column]) == shares


def _numbers(cell: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,.]*", cell)]


def test_every_script_that_is_named_is_here() -> None:
    scripts = {word for command in COMMANDS for word in command.split() if word.startswith("scripts/")}
    tracked = subprocess.run(
        ["git", "ls-files", "scripts"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert scripts <= set(tracked.split())
