"""Whether a plan fits: the shipped 32B on machines that are large enough, and on ones that are not."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_snakemake, write_project

from lib.estimate import Needs
from lib.machine import GIB, Card, Machine
from lib.preflight import JUDGING, RUN, PlannedJob, Preflight, planned_machine, preflight, too_large
from lib.software import Finding, Software
from lib.spec import Hardware, Project, resolve_project


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Project:
    """The shipped config, in a folder in which nothing is built."""
    monkeypatch.chdir(ROOT)
    shipped = resolve_project(yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8")))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    return shipped


@pytest.fixture
def reference(project: Project) -> Machine:
    return planned_machine(project.hardware)


def told(plan: Preflight) -> dict[str, tuple[str, ...]]:
    """What is lacking, by step."""
    return {row.step: row.lacks for row in plan.rows if row.lacks}


def test_the_32b_fits_the_reference_machine_directly(project: Project, reference: Machine) -> None:
    plan = preflight("deepseek32b", project, reference)
    assert plan.fits
    assert set(told(plan)) == {"register_model"}  # four more copies, if its server keeps them here
    assert [row.step for row in plan.rows if not row.optional] == [
        "fetch_base",
        "check_base",
        "train_adapter",
        "build_direct",
        "render_modelfile",
    ]
    fullest = max(row.peak or 0 for row in plan.rows if not row.optional)
    assert 85e9 < fullest < 100 * GIB


def test_weights_per_format(project: Project, reference: Machine) -> None:
    """The report's first table: 128, 64, 32 and 16 GB, of 32 G weights; embeddings are not quantized."""
    formats = preflight("deepseek32b", project, reference).formats
    assert {kind: round(size / 1e9, 1) for kind, size in formats.items()} == {
        "fp32": 131.1,
        "fp16": 65.5,
        "int8": 34.6,
        "4-bit": 19.3,
    }


def test_staged_it_does_not(project: Project, reference: Machine) -> None:
    model = project.models["deepseek32b"]
    staged = replace(model, quantize=replace(model.quantize, path="staged"))
    plan = preflight("deepseek32b", replace(project, models={"deepseek32b": staged}), reference)
    assert not plan.fits
    assert set(told(plan)) == {"merge_adapter", "convert_gguf", "quantize_gguf", "register_model"}
    merge = next(row for row in plan.rows if row.step == "merge_adapter")
    assert merge.lacks == ("disk: the plan takes 131.6 GB until then, 107.4 GB free",)
    assert merge.advice[:2] == ("quantize.path: direct", "keep_intermediates: false")


def test_a_type_that_is_measured_is_not_told_to_be_built_directly() -> None:
    config = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    model = config["models"]["deepseek32b"]
    model["quantize"] = {"types": "auto", "budget": {"file": 22}}
    model["quality"] = {"text": "data/quality.txt", "chunks": 10_000}
    plan = preflight("m", resolve_project({**config, "models": {"m": model}}), Machine((), 0, 0, 0, 1, {".": 10**9}))
    advice = {row.step: row.advice for row in plan.rows}
    assert "a smaller quality.chunks" in advice["measure_types"]
    assert not any("quantize.path: direct" in words for words in advice.values())


def test_judging_is_told_though_it_is_no_part_of_the_plan(project: Project, reference: Machine) -> None:
    """Its file of logits, in bytes: 80 chunks' 255 predictions of 152064 tokens, 16 bits each, as llama.cpp writes."""
    config = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    config["models"]["deepseek32b"]["quality"] = {"text": "data/quality.txt", "chunks": 80}
    judged = resolve_project(config)
    without, plan = (preflight("deepseek32b", each, reference) for each in (project, judged))
    assert not {row.step for row in without.rows} & set(JUDGING)
    assert plan.fits and plan.ledger == without.ledger
    rows = {row.step: row for row in plan.rows if row.optional}
    assert list(rows) == ["register_model", RUN, "merge_adapter", "convert_gguf", "measure_types"]
    logits = 80 * 255 * 2 * 152_064
    assert rows["measure_types"].peak - rows["convert_gguf"].peak == pytest.approx(logits, rel=0.001)
    assert "keep_intermediates: false" in rows["measure_types"].advice
    roomy = replace(reference, disk={".": rows["measure_types"].peak})
    assert all(row.fits for row in preflight("deepseek32b", judged, roomy).rows)


QUALITY = {"text": "data/quality.txt"}
KEEP, DIRECT = "keep_intermediates: false", "quantize.path: direct"


@pytest.mark.parametrize(
    ("model", "step", "advice"),
    [
        ({"quantize": {"path": "staged"}}, "merge_adapter", (DIRECT, KEEP)),
        ({"quality": {**QUALITY, "max_kld": 0.1}}, "merge_adapter", (KEEP,)),
        ({"quality": {**QUALITY, "max_kld": 0.1}, "quantize": {"path": "direct"}}, "convert_gguf", (KEEP,)),
        ({"quantize": {"types": ["f16", "q8_0"], "path": "staged"}}, "merge_adapter", ()),
        ({"quality": {**QUALITY, "chunks": 1}}, "measure_types", (KEEP,)),
        ({"quality": {**QUALITY, "chunks": 5000}}, "measure_types", (KEEP, "a smaller quality.chunks")),
    ],
)
def test_advice_on_disk_is_what_takes_less(model: dict[str, object], step: str, advice: tuple[str, ...]) -> None:
    config = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    config["models"]["deepseek32b"] |= model
    judged = resolve_project(config)
    plan = preflight("deepseek32b", judged, planned_machine(replace(judged.hardware, disk=50)))
    row = next(row for row in plan.rows if row.step == step)
    assert row.advice == (*advice, "free some disk")


def test_other_advice_is_of_what_the_step_follows() -> None:
    def advised(hardware: dict[str, object], **model: object) -> dict[str, str]:
        config = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
        config["models"]["deepseek32b"] |= model
        config["llama_cpp"] = {"cmake_flags": ["-DGGML_CUDA=ON"]}
        plan = preflight("deepseek32b", resolve_project(config), planned_machine(Hardware(**hardware)))
        return {row.step: row.advice[0] for row in plan.rows if row.advice}

    merges = {"quality": {**QUALITY, "device": "cuda", "base_weights": True}}
    cards = advised({"gpus": (1,), "ram": 512, "disk": 1000}, **merges)
    assert (cards["measure_types"], cards["compare_merges"]) == ("quality.device: cpu", "quality.base_weights: false")
    direct = {"quality": QUALITY, "quantize": {"path": "direct"}}
    assert advised({"gpus": (24, 24), "ram": 2, "disk": 1000}, **direct)["convert_gguf"] == "close other programs"


def test_a_file_in_16_bits_is_not_built_directly(project: Project, reference: Machine) -> None:
    model = project.models["demo"]
    plain = replace(model, quantize=replace(model.quantize, types=("f16",), path="direct"))
    plan = preflight("demo", replace(project, models={"demo": plain}), reference)
    steps = {row.step for row in plan.rows if not row.optional}
    assert {"merge_adapter", "convert_gguf"} <= steps and not {"build_direct", "quantize_gguf"} & steps


@pytest.mark.parametrize(
    ("cards", "lack"),
    [
        ((), "GPU: 0 of 0 have"),
        ((Card("a", 24 * GIB),), "GPU: 1 of 1 have"),
        ((Card("a", 24 * GIB), Card("b", 24 * GIB, used=8 * GIB)), "GPU: 1 of 2 have"),
    ],
)
def test_cards_that_are_too_few_or_taken(
    cards: tuple[Card, ...], lack: str, project: Project, reference: Machine
) -> None:
    plan = preflight("deepseek32b", project, replace(reference, cards=cards))
    assert not plan.fits
    assert told(plan)["train_adapter"][0].startswith(lack)


def test_too_little_memory(project: Project, reference: Machine) -> None:
    plan = preflight("demo", project, replace(reference, available=10**9))
    assert not plan.fits
    assert told(plan)["train_adapter"] == ("RAM: 1.0 GB available",)


def test_the_result_runs_on_cards_or_in_memory(project: Project, reference: Machine) -> None:
    def needs(machine: Machine) -> tuple[int, int, int]:
        row = next(row for row in preflight("deepseek32b", project, machine).rows if row.step == RUN)
        return row.needs.gpu, row.needs.gpu_mem_mb, row.needs.mem_mb

    # 20 GB of weights, and 8192 tokens of keys and values for 64 layers of 8 heads of 128 in 16 bits.
    size = (32_763_281_408 * 4.89 / 8 + 2 * 2 * 8192 * 64 * 8 * 128) / 1e6
    cards, each, _ = needs(reference)
    assert cards == 1 and 0 < each - size < 1000
    assert needs(replace(reference, cards=(Card("a", 16 * GIB), Card("b", 16 * GIB))))[0] == 2
    cards, _, memory = needs(replace(reference, cards=(Card("a", 8 * GIB),)))
    assert cards == 0 and 0 < memory - size < 1000


WORKS = Finding("works")
INSTALLED = Software(WORKS, WORKS, WORKS, WORKS, frozenset({"LlamaForCausalLM"}))


def test_what_is_installed_may_be_lacking(project: Project, reference: Machine, tmp_path: Path) -> None:
    def lacking(software: Software) -> dict[str, tuple[str, ...]]:
        plan = preflight("deepseek32b", project, reference, software)
        assert plan.fits == (set(told(plan)) == {"register_model"})
        return {step: lacks for step, lacks in told(plan).items() if step != "register_model"}

    assert lacking(INSTALLED) == {}
    broken = Finding("0.50.2, does not work here: no kernel image", works=False)
    assert lacking(replace(INSTALLED, bitsandbytes=broken)) == {"train_adapter": (f"bitsandbytes: {broken.text}",)}
    assert lacking(replace(INSTALLED, llama_cpp=broken)) == {"check_base": (f"llama.cpp: {broken.text}",)}
    fetched = tmp_path / "bases/deepseek32b"
    fetched.mkdir(parents=True)
    (fetched / "config.json").write_text('{"architectures": ["NewForCausalLM"]}')
    assert lacking(INSTALLED) == {"check_base": ("llama.cpp: does not convert NewForCausalLM",)}


def run(*options: str | Path, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts/preflight.py", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_the_script(tmp_path: Path) -> None:
    done = run("--planned", "--model", "deepseek32b", "--json", tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "\033" not in done.stdout
    assert "build_direct" in done.stdout and "4-bit 19.3 GB" in done.stdout
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] and plan["models"]["deepseek32b"]["fits"]
    assert {row["step"]: row["fits"] for row in plan["models"]["deepseek32b"]["steps"]}["register_model"] is False
    assert plan["machine"]["ram"] == 48 * GIB


def test_the_longest_name_of_a_step_leaves_lines_of_80_columns() -> None:
    quality: dict[str, object] = {"text": "data/quality.txt", "base_weights": True}
    train = {"data": "data/demo.jsonl", "method": "qlora", "eval_fraction": 0.1}
    model = {"quality": quality, "adapter": {"train": train}, "quantize": {"imatrix": {"text": "training"}}}
    roomy = {"hardware": {"gpus": [24, 24], "ram": 48, "disk": 9000}, "models": {"deepseek32b": model}}
    quality["chunks"] = 2000
    done = run("--planned", "--model", "deepseek32b", "--changes", json.dumps(roomy))
    assert done.returncode == 0 and "compute_imatrix.base" in done.stdout and " h  fits, if asked for" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_plan_that_does_not_fit_ends_with_1(tmp_path: Path) -> None:
    changes = '{"hardware": {"gpus": [24, 24], "ram": 48, "disk": 50}}'
    done = run("--planned", "--model", "deepseek32b", "--changes", changes)
    assert done.returncode == 1
    assert "    disk: the plan takes 65.5 GB until then, 53.7 GB free" in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (("--model", "deepsek32b"), 2, "unknown model 'deepsek32b'; did you mean 'deepseek32b'?"),
        (("--config", "missing.yaml"), 1, "missing.yaml"),
        (("--changes", "[]"), 2, "expected an object"),
        (("--changes", "{"), 2, "no valid JSON"),
        (("--changes", '{"modles": {}}'), 1, "unknown key 'modles'"),
    ],
)
def test_wrong_use(options: tuple[str, ...], status: int, said: str) -> None:
    done = run(*options)
    assert done.returncode == status and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["models: [", "- a\n", "\x00"])
def test_no_config_at_all(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    done = run("--config", tmp_path / "c.yaml")
    assert done.returncode == 1 and "c.yaml" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_rule_always_runs_and_takes_snakemakes_config(project: Project, tmp_path: Path) -> None:
    """The demo alone, whose plan fits any machine that runs these tests."""
    config = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    del config["models"]["deepseek32b"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    for _ in range(2):
        done = run_snakemake(tmp_path, "-j1", "preflight", "--config", "keep_intermediates=False")
        assert done.returncode == 0, done.stderr
        assert "quantize_gguf" in done.stdout + done.stderr
        (tmp_path / "reports/preflight.json").unlink()


def job(name: str, *, disk_mb: int = 1, removed: int = 0, **needs: int) -> PlannedJob:
    return PlannedJob(name, Needs(needs.pop("mem_mb", 1), disk_mb, runtime=1, **needs), removed)


def test_what_of_a_run_is_too_large(reference: Machine) -> None:
    taken = replace(reference, available=0, cards=(Card("a", 24 * GIB, used=24 * GIB),))
    assert too_large([job("a", mem_mb=51_000), job("b", gpu=1, gpu_mem_mb=25_000)], taken) == []
    assert too_large([job("a x", mem_mb=52_000), job("b", gpu=2, gpu_mem_mb=20_000)], taken) == [
        "a x (needs 52.0 GB of RAM): RAM: 51.5 GB available",
        "b (needs 0.0 GB of RAM, 2 × 20.0 GB of GPU): GPU: 1 of 1 have 20.0 GB free",
    ]


def test_disk_is_that_of_all_jobs_but_what_is_let_go(reference: Machine) -> None:
    fits = [job("a", disk_mb=60_000), job("b", disk_mb=40_000, removed=60 * 10**9), job("c", disk_mb=60_000)]
    assert too_large(fits, reference) == []
    assert too_large([*fits, job("d", disk_mb=10_000)], reference) == [
        "disk: all of it takes 110.0 GB, 60.0 of them a; 107.4 GB are free"
    ]


def snapshot(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if ".snakemake" not in path.parts}


@pytest.mark.slow
def test_a_run_that_is_too_large_is_refused_before_its_first_job(tiny_base: Path, tmp_path: Path) -> None:
    folder = write_project(tmp_path / "project", base=tiny_base)
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    # Told to be a thousand times as large as it is, which fetch_base would find out.
    shape = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))["models"]["deepseek32b"]["base"]["shape"]
    config["models"]["tiny"]["base"]["shape"] = {**shape, "num_hidden_layers": 64_000}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    before = snapshot(folder)
    done = run_snakemake(folder, "-j1", "models/tiny.q4_k_m.gguf")
    assert done.returncode == 1
    assert "this machine is too small for the plan (nothing was run):" in done.stderr
    assert re.search(
        r"^  disk: all of it takes [0-9.]+ GB, [0-9.]+ of them \w+ tiny; [0-9.]+ GB are free$",
        done.stderr,
        re.MULTILINE,
    )
    assert re.search(r"^  train_adapter tiny \(needs [0-9.]+ GB of RAM\): RAM: ", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr and snapshot(folder) == before
    done = run_snakemake(folder, "-j1", "models/tiny.q4_k_m.gguf", "--config", "force=true")
    assert "too small" not in done.stderr
    assert "base.shape does not describe this checkpoint" in done.stderr


def test_a_limit_clips_neither_a_plan_nor_a_run(tmp_path: Path) -> None:
    """Snakemake's own `--resources` would shrink what a job is said to need, without a word."""
    shutil.copy(ROOT / "config.yaml", tmp_path)
    shutil.copytree(ROOT / "data", tmp_path / "data")
    limited = ("--resources", "gpu=1", "mem_mb=1000", "--", "models/deepseek32b.q4_k_m.gguf")
    planned = run_snakemake(tmp_path, "-n", *limited)
    trained = re.search(r"rule train_adapter:.*?resources: (.*?)\n", planned.stdout + planned.stderr, re.DOTALL)
    assert trained and "gpu=2," in trained[1] and "mem_mb=2329," in trained[1], planned.stderr
    done = run_snakemake(tmp_path, "-j1", *limited)
    assert done.returncode == 1
    assert "a job is larger than a limit that was set (nothing was run):" in done.stderr
    assert "train_adapter deepseek32b needs gpu=2, --resources allows 1\n" in done.stderr
    assert "train_adapter deepseek32b needs mem_mb=2329, --resources allows 1000\n" in done.stderr
    assert not (tmp_path / "work").exists()


def test_a_heatmap_model_has_its_own_steps(project: Project, reference: Machine) -> None:
    plan = preflight("tracknet-demo", project, reference)
    steps = [row.step for row in plan.rows]
    assert steps == ["make_clips", "fetch_base", "train_heatmap", "merge_heatmap", "export_onnx", "evaluate_heatmap"]
    assert plan.fits and all(row.peak for row in plan.rows)
    sizes = [plan.formats[kind] for kind in ("fp32", "fp16", "int8", "4-bit")]
    assert sizes == sorted(sizes, reverse=True)
    assert [entry.step for entry in plan.ledger] == steps


def test_advice_for_a_heatmap_model_is_in_the_documents_order(project: Project, reference: Machine) -> None:
    """Smaller batches first, then checkpointing, then offloading, as the trouble-shooting of the source has it."""
    name, model = "tracknet-demo", project.heatmaps["tracknet-demo"]
    train = replace(model.adapter.train, device="cuda", method="int8", per_device_train_batch_size=256)
    asked = replace(project, heatmaps={name: replace(model, adapter=replace(model.adapter, train=train))})
    small = replace(reference, cards=(Card("small", 10**9),))
    (row,) = (row for row in preflight(name, asked, small).rows if row.step == "train_heatmap")
    assert [lack.partition(":")[0] for lack in row.lacks] == ["GPU"]
    words = ["per_device_train_batch_size", "gradient_checkpointing", "method: qlora", "use_cpu_offload", "input_size"]
    assert len(row.advice) == len(words)
    assert all(word in advice for word, advice in zip(words, row.advice, strict=True))
