"""The whole chain on the tiny model, through Snakemake, from a checkpoint to answers."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, copy_built, run_snakemake, write_project
from test_modelfile import read

from lib.gguf_file import count_types, read_gguf

pytestmark = pytest.mark.slow

ARTIFACTS = (
    "adapters/tiny/adapter_model.safetensors",
    "adapters/tiny/adapter_config.json",
    "adapters/tiny/MANIFEST.json",
    "models/tiny/merged/MANIFEST.json",
    "models/tiny.f16.gguf",
    "models/tiny.q4_k_m.gguf",
    "models/tiny.q4_k_m.gguf.json",
    "models/tiny.Modelfile",
)


def digests(folder: Path) -> dict[str, str]:
    shards = sorted((folder / "models/tiny/merged").glob("*.safetensors"))
    paths = [*(folder / name for name in ARTIFACTS), *shards]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_every_artifact_is_there_with_its_manifest(built: Path) -> None:
    for name in ("bases/tiny", "adapters/tiny", "models/tiny/merged"):
        manifest = json.loads((built / name / "MANIFEST.json").read_text())
        folder = Path(manifest_folder(built, name))
        assert manifest["files"], name
        for file, facts in manifest["files"].items():
            content = (folder / file).read_bytes()
            assert facts == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}, file
    for name in ("tiny.f16.gguf", "tiny.q4_k_m.gguf", "tiny.base.q4_k_m.gguf"):
        manifest = json.loads((built / "models" / f"{name}.json").read_text())
        assert manifest["sha256"] == hashlib.sha256((built / "models" / name).read_bytes()).hexdigest()


def manifest_folder(built: Path, name: str) -> Path:
    """The base is used in place: its manifest lies in bases/, its files where config.yaml says."""
    if name != "bases/tiny":
        return built / name
    return Path(re.search(r"path: (.*)", (built / "config.yaml").read_text())[1])


def test_a_second_run_does_nothing(built: Path, tmp_path: Path) -> None:
    folder, checkout = copy_built(built, tmp_path / "again")  # lest other processes copy Snakemake's lock
    done = run_snakemake(folder, "-j1", "all", "reports/tiny.smoke.json", checkout=checkout)
    assert done.returncode == 0
    assert "Nothing to be done" in done.stderr


def test_adapter_has_an_effect_and_loads_in_peft(built: Path, tiny_base: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    ids = torch.arange(5, 25).unsqueeze(0)
    before = base(ids).logits
    tuned = PeftModel.from_pretrained(base, built / "adapters/tiny")
    assert (tuned(ids).logits - before).abs().max() > 0.01
    config = json.loads((built / "adapters/tiny/adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["base_model_name_or_path"] == "tiny-llama"


def test_merged_checkpoint_is_what_peft_merges(built: Path, tiny_base: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    oracle = PeftModel.from_pretrained(base, built / "adapters/tiny").merge_and_unload().state_dict()
    merged, info = AutoModelForCausalLM.from_pretrained(
        built / "models/tiny/merged", dtype=torch.float16, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert json.loads((built / "models/tiny/merged/config.json").read_text())["dtype"] == "float16"
    for name, tensor in merged.state_dict().items():
        # One unit in the last place of float16, which has 11 bits of precision.
        bound = oracle[name].abs().clamp(min=2**-14) * 2**-10
        assert ((tensor.float() - oracle[name]).abs() <= bound).all(), name


def test_merged_checkpoint_is_sharded_and_keeps_the_tokenizer(built: Path, tiny_base: Path) -> None:
    merged = built / "models/tiny/merged"
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in merged.glob("*.safetensors"))
    assert len(shards) > 1 and shards == sorted(set(index["weight_map"].values()))
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"):
        assert (merged / name).read_bytes() == (tiny_base / name).read_bytes()


def test_gguf_holds_types_template_and_origin(built: Path) -> None:
    found = read_gguf(built / "models/tiny.q4_k_m.gguf")
    assert count_types(found) == {"F32": 5, "Q4_K": 13, "Q6_K": 3}
    assert found.metadata.get("general.name") == "tiny"
    assert (
        found.metadata.get("tokenizer.chat_template")
        == (Path(manifest_folder(built, "bases/tiny")) / "chat_template.jinja").read_text()
    )
    base = json.loads((built / "bases/tiny/MANIFEST.json").read_text())
    adapter = json.loads((built / "adapters/tiny/MANIFEST.json").read_text())
    assert found.metadata.get("general.base_model.0.name") == "tiny-llama"
    assert base["digest"] in found.metadata.get("general.base_model.0.description")
    assert adapter["digest"] in found.metadata.get("general.description")
    assert adapter["origin"]["data"]["sha256"] in found.metadata.get("general.dataset.0.description")


def test_modelfile(built: Path) -> None:
    statements = read((built / "models/tiny.Modelfile").read_text(encoding="utf-8"))
    (template,) = [value for command, value in statements if command == "TEMPLATE"]
    assert template.count("<|im_start|>assistant") == 2 and "{{ $message.Content }}" in template
    assert [each for each in statements if each[0] != "TEMPLATE"] == [
        ("FROM", "./tiny.q4_k_m.gguf"),
        ("PARAMETER temperature", "0.5"),
        ("PARAMETER stop", "<|im_end|>"),
        ("PARAMETER stop", "<s>"),
        ("PARAMETER stop", "<|im_start|>"),
        ("PARAMETER stop", "END"),
        ("SYSTEM", "答えは短く。"),
    ]
    report = json.loads((built / "reports/tiny.chat.json").read_text(encoding="utf-8"))
    assert report["template"] == {"text": template, "reason": None, "rendered_by_go": True}
    assert all(each["tokens"] > 10 for each in report["conversations"].values())


def test_smoke_report_holds_both_models_answers(built: Path) -> None:
    report = json.loads((built / "reports/tiny.smoke.json").read_text(encoding="utf-8"))
    (row,) = report["questions"]
    assert report["asked"] == 1
    assert row["tuned"]["answer"] != row["base"]["answer"]
    assert report["right"]["tuned"] == ("snakemake" in row["tuned"]["answer"].lower())


def test_no_path_of_this_machine_in_any_artifact(built: Path) -> None:
    for name in (*ARTIFACTS, "bases/tiny/MANIFEST.json", "models/tiny.f16.gguf.json", "work/llama_cpp.json"):
        content = (built / name).read_bytes()
        for path in (built, ROOT, Path.home()):
            assert str(path).encode() not in content, name


def test_intermediates_go_when_they_are_not_to_be_kept(built: Path, tiny_base: Path, tmp_path: Path) -> None:
    folder = write_project(tmp_path / "small", base=tiny_base, keep_intermediates=False)
    done = run_snakemake(folder, "-j1", "all")
    assert done.returncode == 0, done.stderr
    assert not (folder / "models/tiny/merged").exists()
    assert not (folder / "models/tiny.f16.gguf").exists()
    assert (folder / "models/tiny.q4_k_m.gguf").read_bytes() == (built / "models/tiny.q4_k_m.gguf").read_bytes()
    again = run_snakemake(folder, "-j1", "all")
    assert "Nothing to be done" in again.stderr
