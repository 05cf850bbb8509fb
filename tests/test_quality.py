"""What quantizing costs a model: llama.cpp's own figures, limits that hold, and nothing measured twice."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from conftest import ROOT, copy_built, planned_rules, run_snakemake
from measure_tuning import measure_tuning
from PIL import Image
from test_rebuild import plan, set_in_config

from lib.llama_cpp import LlamaCpp
from lib.logits_file import LogitsError, logits_bytes, read_logits_file
from lib.perplexity import Evaluator, QualityError
from lib.quality_report import Matrices, compose, refused, write_table
from lib.spec import resolve_project

pytestmark = pytest.mark.slow

CHUNKS = 3
REPORT = "reports/tiny.quality.json"
SETTINGS = {"text": "judged by.txt", "chunks": CHUNKS, "types": ["q8_0", "iq2_xs"], "general_text": "general.txt"}
MATRIX = {"types": ["q4_k_m"], "imatrix": {"text": "weighed by.txt", "chunks": 2}}


def configure(project: Path, checkout: Path, **quality: Any) -> None:
    set_in_config("models", "tiny", "quality", value={**SETTINGS, **quality})(project, checkout)


@pytest.fixture(scope="module")
def judged(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the built folder whose types were measured, and the output of that run."""
    project, checkout = copy_built(built, tmp_path_factory.mktemp("judged") / "a place 場")
    text = tiny.write_text(project / "judged by.txt").read_text().splitlines()
    (project / "general.txt").write_text("\n".join(sorted(text)))
    (project / "weighed by.txt").write_text("\n".join(reversed(text)))
    set_in_config("models", "tiny", "quantize", value=MATRIX)(project, checkout)
    configure(project, checkout)
    done = run_snakemake(project, "-j1", REPORT, checkout=checkout)
    assert done.returncode == 0, done.stderr
    assert "| iq2_xs | weighed by.txt |" in done.stderr
    return project


def read_report(project: Path) -> dict[str, Any]:
    return json.loads((project / REPORT).read_text())


def run_evaluator(llama_cpp: LlamaCpp, project: Path, gguf: str, *words: object) -> str:
    command = [llama_cpp.tool("llama-perplexity"), "-m", gguf, "-c", 512, "-b", 512, "-ngl", 0, *words]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=project, check=True)
    return done.stdout + done.stderr


def test_figures_are_those_that_llama_cpp_prints(judged: Path, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    report, logits = read_report(judged), tmp_path / "logits"
    said = run_evaluator(
        llama_cpp,
        judged,
        "models/tiny.f16.gguf",
        "-f",
        "judged by.txt",
        "--chunks",
        CHUNKS,
        "--kl-divergence-base",
        logits,
    )
    assert f"PPL = {report['reference']['perplexity']:.4f} +/- {report['reference']['error']:.5f}" in said
    for row in report["types"]:
        if row["variant"]:
            continue
        said = run_evaluator(
            llama_cpp, judged, f"models/tiny.{row['type']}.gguf", "--kl-divergence", "--kl-divergence-base", logits
        )
        for line in (
            f"Mean PPL(Q)                   : {row['perplexity']:10.6f} ±",
            f"Mean PPL(Q)/PPL(base)         : {row['perplexity_ratio']:10.6f} ±",
            f"Mean    KLD: {row['mean_kld']:10.6f} ±",
            f"99.9%   KLD: {row['kld_999']:10.6f}",
            f"Same top p: {100 * row['top1']:6.3f} ±",
        ):
            assert line in said


def test_every_type_is_measured_with_and_without_a_matrix(judged: Path) -> None:
    report = read_report(judged)
    assert [(row["type"], row["matrix"]) for row in report["types"]] == [
        ("q8_0", "none"),
        ("q4_k_m", "weighed by.txt"),
        ("q4_k_m", "none"),
        ("q4_k_m", "general.txt"),
        ("iq2_xs", "weighed by.txt"),
        ("iq2_xs", "general.txt"),
    ]
    found = {(row["type"], row["variant"]): row for row in report["types"]}
    assert found["q8_0", ""]["mean_kld"] < found["q4_k_m", ""]["mean_kld"] < found["iq2_xs", ""]["mean_kld"]
    assert len({row["sha256"] for row in report["types"]}) == 6
    assert report["tokens"] == CHUNKS * 255
    assert found["q4_k_m", ""]["size"] == (judged / "models/tiny.q4_k_m.gguf").stat().st_size


def test_what_was_made_for_it_alone_is_gone(judged: Path) -> None:
    left = [str(path.relative_to(judged)) for path in (judged / "work/tiny").rglob("*") if path.is_file()]
    assert not [path for path in left if path.endswith((".logits", ".gguf"))]
    assert plan(judged, ROOT, REPORT) == set()


def test_the_picture_shows_something(judged: Path) -> None:
    with Image.open(judged / "reports/tiny.quality.png") as picture:
        assert picture.size[0] > 800
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 20


def copied(judged: Path, tmp_path: Path) -> Path:
    shutil.copytree(judged, tmp_path / "project", symlinks=True)
    return tmp_path / "project"


def measured_again(project: Path, before: Path) -> set[str]:
    """Make the report anew; of which files the figures were not known."""
    done = run_snakemake(project, "-j1", REPORT)
    assert done.returncode == 0, done.stderr
    assert read_report(project)["reference"] == read_report(before)["reference"]
    return set(re.findall(r"^([a-z0-9_-]+): mean divergence", done.stderr, re.MULTILINE))


def test_another_type_measures_that_alone(judged: Path, tmp_path: Path) -> None:
    project = copied(judged, tmp_path)
    configure(project, ROOT, types=["q8_0", "q6_k"])
    rules = Counter(rule for rule, _ in plan(project, ROOT, REPORT))
    assert rules == {"quantize_gguf": 1, "measure_types": 1, "report_quality": 1}
    assert measured_again(project, judged) == {"q6_k", "q6_k-plain", "q6_k-general"}
    old, new = (read_report(each)["types"] for each in (judged, project))
    assert [row for row in new if row["type"] != "q6_k"] == [row for row in old if row["type"] != "iq2_xs"]


def test_another_general_text_measures_what_was_made_by_it(judged: Path, tmp_path: Path) -> None:
    project = copied(judged, tmp_path)
    (project / "general.txt").write_text((project / "general.txt").read_text()[::-1])
    assert measured_again(project, judged) == {"q4_k_m-general", "iq2_xs-general"}


def test_a_broken_off_measurement_goes_on(judged: Path, tmp_path: Path) -> None:
    """As a killed one leaves it: figures of some files, no output, and what was made for it."""
    project = copied(judged, tmp_path)
    for path in (REPORT, "work/tiny/quality.types.json"):
        (project / path).unlink()
    (project / "work/tiny/quality/q8_0.json").write_text("{")
    (project / "work/tiny/.quality.types.json.scratch").mkdir()
    assert measured_again(project, judged) == {"q8_0"}
    assert read_report(project) == read_report(judged)
    assert not (project / "work/tiny/.quality.types.json.scratch").exists()


@pytest.mark.parametrize("edit", ["text", "chunks"])
def test_another_text_or_length_measures_all(judged: Path, tmp_path: Path, edit: str) -> None:
    project = copied(judged, tmp_path)
    if edit == "text":
        tiny.write_text(project / "judged by.txt", repeats=21)
    else:
        configure(project, ROOT, chunks=2)
    assert "measure_types" in {rule for rule, _ in plan(project, ROOT, REPORT)}
    done = run_snakemake(project, "-j1", REPORT)
    assert done.stderr.count(": mean divergence") == 6


def test_limits_that_are_not_met_fail_all_and_leave_the_files(judged: Path, tmp_path: Path) -> None:
    project = copied(judged, tmp_path)
    worst = next(row for row in read_report(project)["types"] if row["type"] == "q4_k_m" and not row["variant"])
    configure(project, ROOT, max_kld=worst["mean_kld"] / 2)
    before = {path: path.read_bytes() for path in (project / REPORT, project / "models/tiny.q4_k_m.gguf")}
    done = run_snakemake(project, "-j1")
    assert done.returncode == 1
    assert "tiny is not as good as its limits in `quality` ask for:" in done.stderr
    assert f"q4_k_m: mean_kld {worst['mean_kld']:g}, quality.max_kld is {worst['mean_kld'] / 2:g}" in done.stderr
    assert "try quantize.types: a larger type (q8_0 is within the limits)" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in before} == before
    configure(project, ROOT, max_kld=worst["mean_kld"] * 2, min_top1=worst["top1"] / 2)
    done = run_snakemake(project, "-j1")
    assert done.returncode == 0, done.stderr
    # The Modelfile of the type that was quantized anew may still be missing, as the run before broke off.
    assert "check_quality" in planned_rules(done) <= {"check_quality", "render_modelfile"}
    assert plan(project, ROOT) == set()


ROW = {"variant": "", "matrix": "none", "perplexity_ratio": 1.0, "mean_kld": 0.1, "top1": 0.9, "size": 2}


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"max_kld": 0.1, "min_top1": 0.9, "max_perplexity_ratio": 1.0}, None),
        ({"max_kld": 0.09}, "q4_k_m: mean_kld 0.1, quality.max_kld is 0.09"),
        ({"min_top1": 0.91}, "q4_k_m: top1 0.9, quality.min_top1 is 0.91"),
        ({"max_perplexity_ratio": 0.99}, "q4_k_m: perplexity_ratio 1, quality.max_perplexity_ratio is 0.99"),
    ],
)
def test_each_limit(limits: dict[str, float], told: str | None) -> None:
    report = {"types": [{**ROW, "type": "q4_k_m"}, {**ROW, "type": "q2_k", "mean_kld": 9.0}]}
    lines = refused(report["types"], ["q4_k_m"], limits)
    assert lines[:1] == ([told] if told else [])
    if told:
        assert "quantize.imatrix.text" in lines[-1] and "quantize.leave_output_tensor" in lines[-1]


def test_a_larger_type_is_proposed_by_what_was_measured() -> None:
    """Of the demo q5_k_m is further from the 16-bit file than q4_k_m, so that size alone would mislead."""
    sizes = {"q4_k_m": (4, 0.06), "q5_k_m": (5, 0.13), "q6_k": (6, 0.01)}
    rows = [{**ROW, "type": quant, "size": size, "mean_kld": kld} for quant, (size, kld) in sizes.items()]
    assert refused(rows, ["q4_k_m"], {"max_kld": 0.05})[-1].startswith(
        "try quantize.types: a larger type (q6_k is within the limits), or "
    )


def test_a_smaller_type_is_not_called_a_larger_one() -> None:
    """As of the demo, whose q4_k_m is nearer to the 16-bit file than its q5_k_m."""
    rows = [
        {**ROW, "type": quant, "size": size, "mean_kld": kld}
        for quant, size, kld in (("q4_k_m", 4, 0.06), ("q5_k_m", 5, 0.13))
    ]
    assert "try quantize.types: another type (q4_k_m is" in refused(rows, ["q5_k_m"], {"max_kld": 0.1})[-1]


def test_a_chosen_type_becomes_larger_by_its_budget() -> None:
    rows = [{**ROW, "type": "q4_k_m"}, {**ROW, "type": "q8_0", "size": 8, "mean_kld": 0.01}]
    told = refused(rows, ["q4_k_m"], {"max_kld": 0.05}, is_auto=True)[-1]
    assert told.startswith("try quantize.budget: room for a larger type (q8_0 is within the limits), or ")
    # None is larger than q8_0.
    assert "quantize.budget" not in refused(rows, ["q8_0"], {"max_kld": 0.001}, is_auto=True)[-1]


def test_types_without_use_for_a_matrix_have_one_row() -> None:
    both, own, neither = Matrices("own", "general"), Matrices("own", None), Matrices(None, None)
    assert both.variants("q4_k_m") == ["", "-plain", "-general"] and both.variants("q8_0") == [""]
    assert own.variants("iq2_xs") == [""] and neither.variants("q4_k_m") == [""]
    assert (both.describe("q4_k_m", ""), both.describe("q4_k_m", "-plain"), both.describe("q8_0", "")) == (
        "own",
        "none",
        "none",
    )


def test_the_table_of_the_readme_is_as_the_command_writes_it(judged: Path, tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- quality of demo -->\n(.*?)\n<!-- end -->", readme, re.DOTALL)
    assert shown
    types = set(resolve_project(yaml.safe_load((ROOT / "config.yaml").read_text())).models["demo"].quality.types)
    assert {"q4_k_m", *types} == {line.split()[1] for line in shown[1].splitlines()[3:] if line.startswith("| ")}
    assert "Perplexity of the held-out training data (20 samples, q4_k_m):" in shown[1]
    (tmp_path / "README.md").write_text("before\n<!-- quality of tiny -->\nold\n<!-- end -->\nafter\n")
    command = [sys.executable, str(ROOT / "scripts/show_quality.py"), str(judged / REPORT)]
    subprocess.run([*command, "--into", "README.md"], cwd=tmp_path, check=True)
    printed = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    written = (tmp_path / "README.md").read_text()
    assert written == f"before\n<!-- quality of tiny -->\n{printed}<!-- end -->\nafter\n"
    # The same columns as in the shipped README, and a line for each file.
    assert printed.splitlines()[:2] == shown[1].splitlines()[:2] and len(printed.splitlines()) == 3 + 6
    (tmp_path / "README.md").write_text("nothing\n")
    done = subprocess.run([*command, "--into", "README.md"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "README.md has no lines <!-- quality of tiny -->" in done.stderr


@pytest.fixture
def evaluator(llama_cpp: LlamaCpp) -> Evaluator:
    return Evaluator(llama_cpp, threads=2)


def test_a_short_text_is_judged_in_shorter_chunks(judged: Path, evaluator: Evaluator, tmp_path: Path) -> None:
    text = (judged / "judged by.txt").read_text()
    (tmp_path / "short.txt").write_text(text[:400])
    found = evaluator.perplexity(judged / "models/tiny.f16.gguf", tmp_path / "short.txt", chunks=40)
    said = run_evaluator(
        evaluator.llama_cpp,
        judged,
        "models/tiny.f16.gguf",
        "-f",
        tmp_path / "short.txt",
        "-c",
        found.context,
        "-b",
        found.context,
    )
    assert found.context < 512 and f"PPL = {found.perplexity:.4f} +/-" in said
    (tmp_path / "shorter.txt").write_text(text[:30])
    with pytest.raises(QualityError, match=r"shorter.txt is too short: \d+ tokens, and 64 are the least"):
        evaluator.perplexity(judged / "models/tiny.f16.gguf", tmp_path / "shorter.txt", chunks=40)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda whole: whole[:-1], "is not whole"),
        (lambda whole: b"_logit!_" + whole[8:], "is no file of logits"),
        (lambda whole: whole[:5], "is no file of logits"),
    ],
)
def test_damaged_logits_are_refused(
    judged: Path, evaluator: Evaluator, tmp_path: Path, damage: Callable[[bytes], bytes], told: str
) -> None:
    """llama-perplexity itself says nothing of a file that is cut off."""
    logits = tmp_path / "logits"
    evaluator.perplexity(judged / "models/tiny.f16.gguf", judged / "judged by.txt", chunks=CHUNKS, logits=logits)
    held = read_logits_file(logits)
    assert logits.stat().st_size == logits_bytes(vocabulary=held.vocabulary, chunks=held.chunks)
    logits.write_bytes(damage(logits.read_bytes()))
    with pytest.raises(LogitsError, match=told):
        evaluator.divergence(judged / "models/tiny.q4_k_m.gguf", logits)


def test_wrong_options_are_told_plainly(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("words " * 1000)
    command = [sys.executable, ROOT / "scripts/measure_types.py", "--reference=none.gguf", "--text=text.txt"]
    command += ["--known=known", "--output=o.json", "--types"]
    for words, status, told in (
        (["q8_0=some.gguf"], 1, "none.gguf.json is missing"),
        (["q4_k_m"], 1, "none.gguf.json is missing"),
        (["q4_k_m-"], 2, "--types q4_k_m-: expected TYPE=FILE, TYPE, TYPE-plain or TYPE-general"),
        (["q4_k_m-plain=x"], 2, "--types q4_k_m-plain=x: expected"),
        (["q4_9=x"], 2, "--types q4_9=x: expected"),
        (["q4_k_m-general"], 2, "--general-text: name the text"),
    ):
        done = subprocess.run([*map(str, command), *words], capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, told in done.stderr, "Traceback" in done.stderr) == (status, True, False), done.stderr


@pytest.fixture(scope="module")
def both(judged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained by QLoRA, merged both ways, and judged by its held-out data."""
    project = tmp_path_factory.mktemp("compared") / "project"
    shutil.copytree(judged, project, symlinks=True)
    configure(project, ROOT, base_weights=True, types=[])
    tiny.write_data(project / "held out.jsonl", repeats=4)
    train = {**tiny.TRAIN, "method": "qlora", "eval_data": "held out.jsonl"}
    set_in_config("models", "tiny", "adapter", "train", value=train)(project, ROOT)
    done = run_snakemake(project, "-j1", REPORT)
    assert done.returncode == 0, done.stderr
    assert "Away from the model as it was trained:" in done.stderr
    assert "Perplexity of the held-out training data (24 samples, q4_k_m):" in done.stderr
    left = [path for path in (project / "work/tiny").rglob("*") if path.suffix in (".gguf", ".logits")]
    assert not left and plan(project, ROOT, REPORT) == set()
    return project


def test_the_merge_into_the_weights_of_training_is_nearer_to_it(both: Path) -> None:
    """Q8_0 alone is all that lies between it and the adapter on its 4-bit base; llama.cpp judges transformers here."""
    compared = read_report(both)["base_weights"]
    assert compared["nearer"] == "nf4"
    assert compared["nf4"]["mean_kld"] < compared["original"]["mean_kld"]
    assert compared["nf4"]["mean_kld"] < 1e-3 and compared["nf4"]["top1"] > 0.95


NO_TYPES = {"text": {}, "reference": {"chunks": 1, "name": "t.f16.gguf", "size": 1, "perplexity": 1.0}, "types": []}


def test_tuning_shows_in_what_was_held_out(both: Path) -> None:
    """The tiny base knows nothing, and the held-out data are those that were learned."""
    found = read_report(both)["tuning"]
    assert found["verdict"] == "the tuned model predicts them better"
    assert found["tuned"]["perplexity"] < 0.9 * found["base"]["perplexity"]
    assert (found["base"]["name"], found["tuned"]["name"]) == ("tiny.base.q4_k_m.gguf", "tiny.q4_k_m.gguf")
    assert found["tuned"]["chunks"] * found["tuned"]["context"] <= sum(map(len, held_out_tokens(both)))


def held_out_tokens(project: Path) -> list[list[int]]:
    return json.loads((project / "work/tiny/held_out.json").read_text())


def test_tokens_are_judged_as_transformers_judges_them(both: Path, evaluator: Evaluator, tmp_path: Path) -> None:
    """Special tokens among them; the merged checkpoint is what the 16-bit file is made of."""
    import torch
    from transformers import AutoModelForCausalLM

    tokens = [token for sample in held_out_tokens(both) for token in sample]
    found = evaluator.perplexity_of_tokens(
        both / "models/tiny.f16.gguf", tokens, chunks=CHUNKS, scratch=tmp_path / "logits"
    )
    model = AutoModelForCausalLM.from_pretrained(both / "models/tiny/merged", dtype=torch.float32)
    begin, losses = model.config.bos_token_id, []
    for place in range(found.chunks):
        chunk = tokens[place * found.context : (place + 1) * found.context]
        with torch.no_grad():
            logits = model(torch.tensor([[begin, *chunk[1:]]])).logits[0].double()
        judged = range(found.context // 2, found.context - 1)
        losses += [torch.nn.functional.cross_entropy(logits[each], torch.tensor(chunk[each + 1])) for each in judged]
    expected = torch.stack(losses).mean().exp().item()
    assert found.perplexity == pytest.approx(expected, rel=2e-3)


def test_tokens_of_a_text_are_judged_as_the_text_is(judged: Path, evaluator: Evaluator, tmp_path: Path) -> None:
    gguf, logits = judged / "models/tiny.f16.gguf", tmp_path / "logits"
    expected = evaluator.perplexity(gguf, judged / "judged by.txt", chunks=CHUNKS, logits=logits)
    tokens = read_logits_file(logits).tokens.ravel().tolist()
    found = evaluator.perplexity_of_tokens(gguf, tokens, chunks=CHUNKS, scratch=tmp_path / "scratch")
    assert (found.context, found.chunks) == (expected.context, expected.chunks)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
    assert found.error == pytest.approx(expected.error, rel=1e-2)
    with pytest.raises(QualityError, match="223 tokens are too few to be judged by: 224 are the least"):
        evaluator.perplexity_of_tokens(gguf, tokens[:223], chunks=CHUNKS, scratch=tmp_path / "scratch")
    with pytest.raises(QualityError, match="and there is a token 70000: of another model"):
        evaluator.perplexity_of_tokens(gguf, [*tokens[:511], 70000] * 2, chunks=CHUNKS, scratch=tmp_path / "scratch")


def test_too_few_held_out_tokens_leave_the_rest_of_the_report(evaluator: Evaluator, tmp_path: Path) -> None:
    (tmp_path / "held_out.json").write_text("[[1, 2], [3]]")
    tuning = measure_tuning(
        tuned=tmp_path / "a.gguf",
        base=tmp_path / "b.gguf",
        held_out=tmp_path / "held_out.json",
        chunks=4,
        output=tmp_path / "tuning.json",
        evaluator=evaluator,
    )
    told = "3 tokens are too few to be judged by: 224 are the least"
    assert json.loads((tmp_path / "tuning.json").read_text()) == tuning == {"samples": 2, "reason": told}
    report = compose(model="t", types=NO_TYPES, matrices=Matrices(None, None), merges=None, tuning=tuning)
    assert (
        f"The held-out training data (2 samples) do not show what tuning brought: {told}; hold out more by"
        in write_table(report)
    )


@pytest.mark.parametrize(
    ("tuned", "verdict"),
    [
        (7.0, "the tuned model predicts them better"),
        (13.0, "the tuned model predicts them worse than its base"),
        (10.9, "no difference that could not be chance"),
    ],
)
def test_a_tuning_that_harmed_or_did_nothing_is_told(tuned: float, verdict: str) -> None:
    figures = {"error": 0.8, "context": 512, "chunks": 2, "name": "t.q4_k_m.gguf"}
    tuning = {"samples": 9, "base": {**figures, "perplexity": 10.0}, "tuned": {**figures, "perplexity": tuned}}
    report = compose(model="t", types=NO_TYPES, matrices=Matrices(None, None), merges=None, tuning=tuning)
    assert report["tuning"]["verdict"] == verdict
    assert f"10.00 ± 0.80 before tuning, {tuned:.2f} ± 0.80 after; {verdict}." in write_table(report)
