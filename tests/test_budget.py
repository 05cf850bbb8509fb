"""`quantize.types: auto`: the best measured type that fits, and what is measured for it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from conftest import copy_built, run_snakemake
from test_rebuild import plan, set_in_config

from lib import estimate
from lib.budget import Budget, BudgetError, candidates, choose
from lib.chosen_type import ChosenTypeError, read_chosen
from lib.gguf_file import read_gguf
from lib.sizes import GIB
from lib.spec import Model, resolve_project

GGUF = "models/tiny.auto.gguf"
ROWS = [
    {"type": quant, "variant": variant, "size": size, "mean_kld": kld}
    for quant, variant, size, kld in (
        ("q8_0", "", 800, 0.01),
        ("q5_k_m", "", 500, 0.13),
        ("q4_k_m", "", 400, 0.06),
        ("q4_k_m", "-plain", 400, 0.001),
        ("q2_k", "", 200, 0.5),
    )
]


@pytest.mark.parametrize(("room", "quant"), [(10_000, "q8_0"), (800, "q8_0"), (799, "q4_k_m"), (399, "q2_k")])
def test_the_nearest_of_what_fits_is_taken(room: int, quant: str) -> None:
    """More bits are not always nearer, and files made for the comparison alone do not count."""
    assert choose(ROWS, Budget(room / GIB, None), 0)["type"] == quant


def test_nothing_that_fits_is_told_with_what_there_is() -> None:
    with pytest.raises(BudgetError) as refused:
        choose(ROWS, Budget(199 / GIB, None), 0)
    assert "GiB of file: q2_k, the smallest that was measured" in str(refused.value)
    assert "num_ctx" not in str(refused.value)
    with pytest.raises(BudgetError, match="raise quantize.budget, lower ollama.parameters.num_ctx, or name smaller"):
        choose(ROWS, Budget(None, 1), 10**9)


def budgeted(**changes: Any) -> Model:
    """The shipped 32B with a budget."""
    config = yaml.safe_load((Path(__file__).parents[1] / "config.yaml").read_text(encoding="utf-8"))
    model = config["models"]["deepseek32b"]
    model["quantize"] = {"types": "auto", "budget": {"file": 22}} | changes.pop("quantize", {})
    model["quality"] = {"text": "data/quality.txt", **changes}
    return resolve_project({**config, "models": {"m": model}}).models["m"]


def test_types_that_cannot_fit_are_not_measured() -> None:
    assert budgeted().quantize.candidates == ("q5_k_m", "q4_k_m", "iq4_xs", "q3_k_m")
    assert budgeted(quantize={"budget": {"file": 40}}).quantize.candidates == ("q8_0", "q6_k", "q5_k_m", "q4_k_m")
    assert budgeted(types=["q4_0", "q8_0", "q3_k_s"]).quantize.candidates == ("q4_0", "q3_k_s")


def test_published_sizes_are_not_passed_over() -> None:
    """Of the 32B: Q4_K_M has 19.85 GB, Q6_K 26.89 GB; each is measured for a budget that it fits by a hair."""
    for quant, size in (("q4_k_m", 19.85e9), ("q6_k", 26.89e9)):
        assert quant in candidates(estimate.shape_of(budgeted()), int(size * 1.001), [quant])


def test_memory_of_a_card_holds_the_cache_as_well() -> None:
    """Keys and values of 64 layers, 8 heads of 128 and 8192 tokens, in 16 bits: 2 × 2 × 64 × 8 × 128 × 8192 bytes."""
    cache = estimate.cache_bytes(estimate.shape_of(budgeted()), 8192)
    assert cache == 2**31
    room = Budget(file=None, gpu_memory=24).room(cache)
    assert room == 24 * GIB - 600_000_000 - 2**31
    assert (
        Budget(file=None, gpu_memory=24).describe(cache)
        == "24 GiB of GPU memory (23.02 GB for the file beside 2.15 GB of keys and values)"
    )


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"type": "q9"}'])
def test_a_file_that_tells_no_type(content: str, tmp_path: Path) -> None:
    (tmp_path / "type.json").write_text(content)
    with pytest.raises(ChosenTypeError, match="type.json tells no type; choose_type.py writes it"):
        read_chosen(tmp_path / "type.json")


# The chain.


@pytest.fixture(scope="module")
def chosen(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in the best type of at most half its size in 16 bits, with an importance matrix."""
    project, checkout = copy_built(built, tmp_path_factory.mktemp("chosen") / "project")
    text = tiny.write_text(project / "judged.txt").read_text().splitlines()
    (project / "weighed.txt").write_text("\n".join(reversed(text)))
    budget = (project / "models/tiny.f16.gguf").stat().st_size * 0.5 / GIB
    quantize = {"types": "auto", "budget": {"file": budget}, "imatrix": {"text": "weighed.txt", "chunks": 2}}
    quality = {"text": "judged.txt", "chunks": 2, "types": ["q8_0", "q4_k_m", "iq2_xs"], "max_kld": 1}
    set_in_config("models", "tiny", "quantize", value=quantize)(project, checkout)
    set_in_config("models", "tiny", "quality", value=quality)(project, checkout)
    done = run_snakemake(project, "-j1", "all", "reports/tiny.quality.json", checkout=checkout)
    assert done.returncode == 0, done.stderr
    assert "Built as auto: q4_k_m, the nearest to the 16-bit file of what fits" in done.stderr
    return project


@pytest.mark.slow
def test_the_file_is_the_best_that_fits(chosen: Path) -> None:
    report = json.loads((chosen / "reports/tiny.quality.json").read_text())
    found = {(row["type"], row["variant"]): row for row in report["types"]}
    assert report["chosen"]["type"] == "q4_k_m" and found["q8_0", ""]["mean_kld"] < found["q4_k_m", ""]["mean_kld"]
    assert found["q8_0", ""]["size"] > 0.5 * (chosen / "models/tiny.f16.gguf").stat().st_size
    assert read_gguf(chosen / GGUF).metadata["general.file_type"] == 15  # llama.h: LLAMA_FTYPE_MOSTLY_Q4_K_M
    manifest = json.loads((chosen / f"{GGUF}.json").read_text())
    assert manifest["sha256"] == found["q4_k_m", ""]["sha256"] != found["q4_k_m", "-plain"]["sha256"]
    assert (chosen / "models/tiny.Modelfile").read_text().startswith("FROM ./tiny.auto.gguf\n")
    assert json.loads((chosen / "work/tiny/quality.json").read_text())["types"] == ["q4_k_m"]
    left = {path.name for path in chosen.rglob("tiny.*.gguf") if ".base." not in path.name}
    assert left == {"tiny.auto.gguf", "tiny.f16.gguf", "tiny.imatrix.gguf", "tiny.q4_k_m.gguf"}  # the last was there
    assert not list((chosen / "work").rglob("*.gguf"))


@pytest.mark.slow
def test_another_budget_chooses_again_and_measures_what_is_new_alone(chosen: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(chosen, project, symlinks=True)
    checkout = Path(__file__).parents[1]
    assert plan(project, checkout, GGUF) == set()
    set_in_config("models", "tiny", "quantize", "budget", value={"file": 1})(project, checkout)
    set_in_config("models", "tiny", "quality", "types", value=["q6_k", "q8_0", "q4_k_m", "iq2_xs"])(project, checkout)
    done = run_snakemake(project, "-j1", GGUF)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^([\w-]+): mean divergence", done.stderr, re.MULTILINE) == ["q6_k", "q6_k-plain"]
    assert read_gguf(project / GGUF).metadata["general.file_type"] == 7  # LLAMA_FTYPE_MOSTLY_Q8_0, without the matrix
