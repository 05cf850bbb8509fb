"""Training heatmap models: every method, split updates, frozen backbones, going on, and merging."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import heatmap_runs as runs
import merge_heatmap
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from lib import heatmap_training
from lib.adapted_model import AdapterError
from lib.frames import HeatmapBatch, HeatmapSample
from lib.heatmap_folder import TRAINED, load_heatmap, normalize
from lib.heatmap_trainer import HeatmapTrainer, mirror
from lib.training_run import trainer_arguments

METHODS = ("full", "lora", "int8", "qlora")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_clips(tmp_path_factory.mktemp("clips") / "set")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("bases")
    return {kind: runs.write_base(place / kind, kind) for kind in runs.BACKBONES}


def samples(count: int, seed: int = 0) -> list[HeatmapSample]:
    """Noise with balls here and there, of the size that the miniature takes."""
    generator = torch.Generator().manual_seed(seed)
    return [
        HeatmapSample(
            torch.randint(0, 256, (3, 48, 96), generator=generator, dtype=torch.uint8), (5.0 + number, 10.5), (192, 96)
        )
        for number in range(count)
    ]


def make_trainer(
    base: Path, folder: Path, cleanup: ExitStack, *, kind: str = "vit", **changes: object
) -> HeatmapTrainer:
    torch.manual_seed(0)
    built = runs.build_model(base, kind=kind, cleanup=cleanup, **changes)
    asked = runs.settings(**changes)
    return HeatmapTrainer(
        settings=asked,
        config=built.config,
        model=built.model,
        args=trainer_arguments(asked, folder, evaluates=False),
        train_dataset=samples(4),
    )


def gradients(trainer: HeatmapTrainer, inputs: list[HeatmapSample]) -> dict[str, torch.Tensor]:
    trainer.training_step(trainer.model, HeatmapBatch.of(inputs))
    return {name: weight.grad.clone() for name, weight in trainer._trained.items() if weight.grad is not None}


@pytest.mark.parametrize("kind", runs.BACKBONES)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_every_method_and_backbone(
    bases: dict[str, Path], clips: Path, tmp_path: Path, method: str, kind: str
) -> None:
    """The merged model computes what the trained one did, by peft's and bitsandbytes' own forward pass."""
    computed = {}

    folder = tmp_path / "adapter"
    with pytest.MonkeyPatch.context() as patch:
        finish = HeatmapTrainer.train

        def train_and_remember(self: HeatmapTrainer, **how: object) -> object:
            nonlocal config
            result = finish(self, **how)
            config = self._config
            size = (config.input.height, config.input.width)
            pixels = torch.nn.functional.interpolate(
                torch.stack([each.pixels for each in samples(2)]).float(), size=size
            ).to(torch.uint8)
            self.model.eval()
            with torch.no_grad():
                computed["trained"], computed["pixels"] = self.model(normalize(pixels, config)), pixels
            return result

        config = None
        patch.setattr(HeatmapTrainer, "train", train_and_remember)
        manifest = runs.train(bases[kind], clips, folder, kind=kind, method=method)
    record = json.loads(Path(f"{folder}.json").read_text())
    assert len(record["steps"]) == 4 and record["steps"][-1]["frames"] == 4
    assert len(record["evaluations"]) == 1
    assert ("adapter_model.safetensors" in manifest["files"]) == (method != "full")

    merge_heatmap.merge_heatmap(
        base=bases[kind], base_manifest=None, adapter=folder, dtype="float32", output=tmp_path / "merged", threads=1
    )
    merged = load_heatmap(tmp_path / "merged")
    with torch.no_grad():
        found = merged.model(normalize(computed["pixels"], merged.config))
    # What the backbone lost by 8 and 4 bits is not in the merged weights.
    allowed = {"full": 1e-5, "lora": 1e-4, "int8": 0.15, "qlora": 0.5}[method]
    assert (found - computed["trained"]).abs().max() < allowed
    assert computed["trained"].std() > 0.01


@pytest.mark.parametrize("kind", ["vit", "convnext"])
@pytest.mark.parametrize(
    "change", [{"gradient_checkpointing": True}, {"micro_batching": {"micro_batch_size": 1}}], ids=["again", "split"]
)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_do_not_depend_on_how_they_are_computed(
    bases: dict[str, Path], tmp_path: Path, kind: str, change: dict[str, object], method: str
) -> None:
    # LLM.int8 looks for outliers in all of a batch; a threshold of 0 looks for none.
    shared = {"method": method, "lora": {"lora_dropout": 0.0}, "quantization": {"llm_int8_threshold": 0.0}}
    found = []
    for changes in ({}, change):
        with ExitStack() as cleanup:
            trainer = make_trainer(bases[kind], tmp_path, cleanup, kind=kind, **shared, **changes)
            found.append(gradients(trainer, samples(4)))
    plain, other = found
    assert plain.keys() == other.keys() and len(plain) > 10
    for name, gradient in plain.items():
        torch.testing.assert_close(other[name], gradient, rtol=2e-3, atol=2e-3 * gradient.abs().max().item() + 1e-7)


def test_memory_that_runs_out_splits_the_update(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as cleanup:
        trainer = make_trainer(bases["vit"], tmp_path, cleanup)
        whole = gradients(trainer, samples(4))
        trainer.model.zero_grad()
        compute = HeatmapTrainer.summed_loss

        def refuse_more_than_two(self: HeatmapTrainer, part: HeatmapBatch) -> torch.Tensor:
            if len(part) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return compute(self, part)

        monkeypatch.setattr(HeatmapTrainer, "summed_loss", refuse_more_than_two)
        split = gradients(trainer, samples(4))
        assert trainer.batcher.size == 2
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["full", "int8"])
def test_a_frozen_backbone_thaws_and_the_micro_batch_is_searched_anew(
    bases: dict[str, Path], clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """24 frames in one game of 12: three updates an epoch, of which the first two epochs are frozen."""
    seen: list[tuple[bool, int, int]] = []
    step = HeatmapTrainer.training_step

    def looking(self: HeatmapTrainer, *inputs: object) -> torch.Tensor:
        if self.state.global_step == 1:
            self.batcher.size = 1  # as after memory ran out
        loss = step(self, *inputs)
        moved = any(w.grad is not None for name, w in self._trained.items() if name.startswith("backbone."))
        seen.append((moved, self.batcher.size, self.state.global_step))
        return loss

    monkeypatch.setattr(HeatmapTrainer, "training_step", looking)
    frozen = {"num_train_epochs": 3, "max_steps": -1, "freeze_backbone_epochs": 2}
    runs.train(bases["vit"], clips, tmp_path / "adapter", method=method, **frozen)
    each = len(seen) // 3
    assert [moved for moved, _, _ in seen] == [False] * 2 * each + [True] * each
    assert [size for _, size, _ in seen] == [4] + [1] * (2 * each - 1) + [4] * each


def test_an_int8_backbone_without_adapter_is_not_trained(bases: dict[str, Path], clips: Path, tmp_path: Path) -> None:
    manifest = runs.train(bases["vit"], clips, tmp_path / "adapter", method="int8", lora={"enabled": False})
    assert sorted(manifest["files"]) == ["config.json", TRAINED]
    assert not any(name.startswith("backbone.") for name in load_file(tmp_path / "adapter" / TRAINED))
    merge_heatmap.merge_heatmap(
        base=bases["vit"],
        base_manifest=None,
        adapter=tmp_path / "adapter",
        dtype="float32",
        output=tmp_path / "merged",
        threads=1,
    )
    state = load_heatmap(tmp_path / "merged").model.state_dict()
    published = load_file(bases["vit"] / "model.safetensors")
    assert torch.equal(state["backbone.layernorm.weight"], published["layernorm.weight"])


@pytest.mark.parametrize("norm", ["gn", "bn"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    bases: dict[str, Path], clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, norm: str
) -> None:
    asked = {"shape": {"norm": norm}, "max_steps": 5, "save_steps": 2, "freeze_backbone_epochs": 1}
    whole = runs.train(bases["vit"], clips, tmp_path / "whole", **asked)
    step = HeatmapTrainer.training_step

    def break_off(self: HeatmapTrainer, *inputs: object) -> torch.Tensor:
        if self.state.global_step == 3:
            raise RuntimeError("the power is gone")
        return step(self, *inputs)

    with monkeypatch.context() as patch:
        patch.setattr(HeatmapTrainer, "training_step", break_off)
        with pytest.raises(RuntimeError, match="the power is gone"):
            runs.train(bases["vit"], clips, tmp_path / "parts", **asked)
    resumed = runs.train(bases["vit"], clips, tmp_path / "parts", **asked)
    assert resumed["files"] == whole["files"]
    assert [entry["step"] for entry in json.loads((tmp_path / "parts.json").read_text())["steps"]] == [1, 2, 3, 4, 5]


def test_frames_read_by_other_processes_give_the_same_bytes(
    bases: dict[str, Path], clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over epochs, between which they stay, with dropout and evaluations in between."""
    asked = {"method": "lora", "max_steps": 8, "eval_steps": 2}
    plain = runs.train(bases["vit"], clips, tmp_path / "plain", **asked)
    readers: list[set[int]] = []
    step = HeatmapTrainer.training_step

    def looking(self: HeatmapTrainer, *inputs: object) -> torch.Tensor:
        readers.append({process.pid for process in multiprocessing.active_children()})
        return step(self, *inputs)

    monkeypatch.setattr(HeatmapTrainer, "training_step", looking)
    read = runs.train(bases["vit"], clips, tmp_path / "read", **asked, dataloader_num_workers=2)
    assert len(readers) == 8 and len(readers[0]) == 2 and readers == [readers[0]] * 8
    assert readers[0].isdisjoint(process.pid for process in multiprocessing.active_children())
    assert read == plain
    records = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plain", "read")]
    assert records[0]["evaluations"] == records[1]["evaluations"] and len(records[0]["evaluations"]) == 4


@pytest.mark.parametrize(
    ("asked", "cores", "shared", "found"),
    [
        ({}, 16, 10**10, 0),
        ({"device": "cuda"}, 16, 10**10, 8),
        ({"device": "cuda"}, 4, 10**10, 3),
        ({"device": "cuda"}, 1, 10**10, 0),
        # Of 4 frames of 96 × 48 pixels each that holds four batches, twice, for two processes.
        ({"device": "cuda"}, 16, 2 * 8 * 4 * 3 * 96 * 48, 2),
        ({"device": "cuda", "dataloader_num_workers": 12}, 4, 0, 12),
    ],
)
def test_how_many_processes_read_frames(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, object], cores: int, shared: int, found: int
) -> None:
    config = SimpleNamespace(heatmap=runs.heatmap(), input=SimpleNamespace(width=96, height=48))
    monkeypatch.setattr(heatmap_training, "usable_cores", lambda: cores)
    monkeypatch.setattr(heatmap_training, "disk_usage", lambda _: SimpleNamespace(free=shared))
    assert heatmap_training._readers(runs.settings(**asked), config) == found


@pytest.mark.parametrize("broken", [3, 4])
def test_a_stopped_run_whose_frames_others_read_goes_on_to_the_same_bytes(
    bases: dict[str, Path], clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    """From within an epoch of three updates, and from its end."""
    asked = {"method": "lora", "max_steps": 8, "save_steps": 1, "eval_steps": 2, "dataloader_num_workers": 2}
    whole = runs.train(bases["vit"], clips, tmp_path / "whole", **asked)
    step = HeatmapTrainer.training_step

    def break_off(self: HeatmapTrainer, *inputs: object) -> torch.Tensor:
        if self.state.global_step == broken:
            raise RuntimeError("the power is gone")
        return step(self, *inputs)

    with monkeypatch.context() as patch:
        patch.setattr(HeatmapTrainer, "training_step", break_off)
        with pytest.raises(RuntimeError, match="the power is gone"):
            runs.train(bases["vit"], clips, tmp_path / "parts", **asked)
    assert runs.train(bases["vit"], clips, tmp_path / "parts", **asked) == whole


def test_weights_on_disk_give_the_same_adapter(bases: dict[str, Path], clips: Path, tmp_path: Path) -> None:
    shared = {"method": "lora", "gradient_checkpointing": True}
    offload = {"use_disk_offload": True, "offload_folder": str(tmp_path), "max_memory": {"cpu": "0MB"}}
    plain = runs.train(bases["vit"], clips, tmp_path / "plain", **shared)
    streamed = runs.train(bases["vit"], clips, tmp_path / "streamed", **shared, offload=offload)
    assert streamed["files"] == plain["files"]


def test_targets_by_any_name_give_the_names_of_the_pinned_version(
    bases: dict[str, Path], clips: Path, tmp_path: Path
) -> None:
    runs.train(
        bases["dinov2"],
        clips,
        tmp_path / "a",
        kind="dinov2",
        method="lora",
        lora={"target_modules": ["query", "value"]},
    )
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"] and config["task_type"] == "FEATURE_EXTRACTION"
    names = load_file(tmp_path / "a/adapter_model.safetensors")
    assert "base_model.model.encoder.layer.1.attention.v_proj.lora_B.weight" in names and len(names) == 8


def test_no_adapter_is_put_on_a_pooler(bases: dict[str, Path]) -> None:
    """No heatmap passes through it: the adapter would learn nothing, and what is saved would hold no weights."""
    with ExitStack() as cleanup, pytest.raises(AdapterError, match="no linear layer named 'dense'; known are fc1, fc2"):
        runs.build_model(bases["vit"], cleanup=cleanup, method="lora", lora={"target_modules": ["dense"]})


def test_every_linear_layer_of_the_backbone_is_adapted(bases: dict[str, Path], clips: Path, tmp_path: Path) -> None:
    runs.train(bases["convnext"], clips, tmp_path / "a", kind="convnext", method="lora")
    adapted = {name.partition(".lora_")[0] for name in load_file(tmp_path / "a/adapter_model.safetensors")}
    # Two in each of the 1 + 2 + 1 blocks.
    assert len(adapted) == 8 and all(name.rpartition(".")[2] in ("pwconv1", "pwconv2") for name in adapted)


def test_a_mirrored_frame_has_its_ball_on_the_other_side() -> None:
    pixels = torch.zeros(3, 24, 48, dtype=torch.uint8)
    pixels[:, 10, 5] = 255
    batch = HeatmapBatch.of([HeatmapSample(pixels, (5.0, 10.0), (48, 24))] * 2)
    mirrored = mirror(batch, torch.tensor([False, True]), 48)
    assert torch.equal(mirrored.pixels[0], pixels) and mirrored.points[0].tolist() == [5.0, 10.0]
    x, y = mirrored.points[1].tolist()
    assert mirrored.pixels[1][:, int(y), int(x)].tolist() == [255] * 3 and mirrored.pixels[1].sum() == 3 * 255
    assert torch.equal(batch.pixels[1], pixels)


def test_a_merged_model_loads_without_peft_and_bitsandbytes(
    bases: dict[str, Path], clips: Path, tmp_path: Path
) -> None:
    runs.train(bases["vit"], clips, tmp_path / "adapter", method="qlora")
    merge_heatmap.merge_heatmap(
        base=bases["vit"],
        base_manifest=None,
        adapter=tmp_path / "adapter",
        dtype="float16",
        output=tmp_path / "merged",
        threads=1,
    )
    program = (
        "import sys; sys.modules.update(peft=None, bitsandbytes=None)\n"
        f"sys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
        "from pathlib import Path; from lib.heatmap_folder import load_heatmap\n"
        f"print(load_heatmap(Path({str(tmp_path / 'merged')!r})).model.config.model_type)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "vit\n"), done.stderr


def test_another_backbone_is_not_merged(bases: dict[str, Path], clips: Path, tmp_path: Path) -> None:
    runs.train(bases["vit"], clips, tmp_path / "adapter")
    with pytest.raises(merge_heatmap.HeatmapMergeError, match="trained on another backbone"):
        merge_heatmap.merge_heatmap(
            base=bases["dinov2"],
            base_manifest=None,
            adapter=tmp_path / "adapter",
            dtype="float32",
            output=tmp_path / "merged",
            threads=1,
        )
    assert not (tmp_path / "merged").exists()
