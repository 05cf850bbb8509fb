"""Streamed blocks: the same numbers as with the whole model, one block at a time, files that do not stay behind."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import training_runs as runs
from small_disk import small_disk
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaConfig, LlamaForCausalLM

from lib import offload
from lib.adapter_trainer import AdapterTrainer
from lib.cli import describe_os_error
from lib.offload import BlockStreamer, decoder_blocks, stream_beyond
from lib.samples import pad_batch
from lib.split_trainer import TrainingError
from lib.token_loss import TokenLoss
from lib.train_settings import Train
from lib.training import train_lora
from lib.training_run import Places

CPU = torch.device("cpu")
BLOCKS = 5
ON_DISK = {"use_disk_offload": True, "max_memory": {"cpu": "0MB"}}
WAYS: dict[str, dict[str, Any]] = {
    "lora fp32": {"method": "lora"},
    "lora bf16": {"method": "lora", "precision": "bf16"},
    "lora fp16": {"method": "lora", "precision": "fp16"},
    "DoRA": {"method": "lora", "lora": {"r": 4, "use_dora": True}},
    "dropout": {"method": "lora", "lora": {"r": 4, "lora_dropout": 0.2}},
    "nf4": {"method": "qlora"},
    "fp4, not nested": {
        "method": "qlora",
        "quantization": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    },
    "int8": {"method": "int8"},
    "int8 without outliers": {"method": "int8", "precision": "bf16", "quantization": {"llm_int8_threshold": 0}},
    "int8 beside 16 bits": {
        "method": "int8",
        "precision": "bf16",
        "quantization": {"llm_int8_has_fp16_weight": True},
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow Llama of five blocks."""
    torch.manual_seed(2)
    sizes = {**tiny.SHAPE, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": BLOCKS}
    folder = tmp_path_factory.mktemp("deep")
    LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def adapted(base: Path, *, to_be_streamed: bool = False, **train: Any) -> Any:
    run = runs.settings(**train, gradient_checkpointing=True)
    return runs.adapted(base, run, streamed=to_be_streamed).train()


def streamed(base: Path, folder: Path | None, *, limit: int = 0, **train: Any) -> tuple[Any, BlockStreamer]:
    model = adapted(base, to_be_streamed=True, **train)
    return model, stream_beyond(model, device=CPU, limit=limit, folder=folder)


def numbers(model: Any, run: Train) -> list[torch.Tensor]:
    """Losses and gradients of two updates, and a loss without gradient after each."""
    batches = [pad_batch(runs.samples(3, seed=seed), pad=0) for seed in (1, 2)]
    loss_of, found = TokenLoss(model), []
    torch.manual_seed(4)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[run.precision]
    for batch in batches:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = loss_of(batch)
        loss.backward()
        found += [loss.detach().clone(), *(weight.grad.clone() for weight in trained)]
        with torch.no_grad():
            for weight in trained:
                weight -= 1e-3 * weight.grad
                weight.grad = None
        model.eval()
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
            found.append(loss_of(batch))
        model.train()
    return found


@pytest.mark.parametrize("way", WAYS)
def test_the_numbers_are_those_of_the_whole_model(way: str, base: Path, tmp_path: Path) -> None:
    run = runs.settings(**WAYS[way])
    whole = numbers(adapted(base, **WAYS[way]), run)
    assert all(torch.isfinite(each).all() for each in whole)
    assert any(each.abs().max() > 0 for each in whole[1:-1])
    for folder in (tmp_path, None) if way in ("lora fp32", "nf4", "int8") else (tmp_path,):
        model, streamer = streamed(base, folder, **WAYS[way])
        assert streamer.blocks == BLOCKS
        found = numbers(model, run)
        assert len(found) == len(whole)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, whole, strict=True))


def frozen(block: Any) -> list[torch.Tensor]:
    """The weights of a block that are streamed: its matrices, adapters apart."""
    return [
        weight.data
        for name, weight in block.named_parameters()
        if not weight.requires_grad and weight.dim() == 2 and "norm" not in name
    ]


def is_present(block: Any) -> bool:
    """Whether a block's weights have memory, bitsandbytes' own references too; kept in a file they have a value's."""
    tensors = frozen(block)
    for module in block.modules():
        for holder in (getattr(module, "weight", None), getattr(module, "state", None)):
            if getattr(holder, "CB", None) is not None:
                tensors.append(holder.CB)
    return any(tensor.untyped_storage().nbytes() >= tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("way", ["lora fp32", "nf4", "int8", "int8 beside 16 bits"])
def test_one_block_at_a_time_is_in_memory(
    way: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = streamed(base, tmp_path, **WAYS[way])
    blocks = decoder_blocks(model)
    seen: list[int] = []
    contents: list[StorageWeakRef] = []
    read = offload._read_bytes

    def noting_read(*asked: Any) -> torch.Tensor:
        assert all(content.expired() for content in contents), "what was read before still has its memory"
        content = read(*asked)
        contents.append(StorageWeakRef(content.untyped_storage()))
        return content

    def noting_block(number: int) -> Callable[..., None]:
        def note(*_: Any) -> None:
            assert [i for i, block in enumerate(blocks) if is_present(block)] == [number]
            seen.append(number)

        return note

    monkeypatch.setattr(offload, "_read_bytes", noting_read)
    for number, block in enumerate(blocks):
        block.mlp.down_proj.register_forward_pre_hook(noting_block(number))
    assert not any(is_present(block) for block in blocks)
    loss = TokenLoss(model)
    seen.clear(), contents.clear()
    loss(pad_batch(runs.samples(2), pad=0)).backward()
    # Forward, and backward each block once more; the last is still there when its turn comes.
    assert seen == [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]
    assert len(contents) == 2 * BLOCKS - 1
    assert sum(is_present(block) for block in blocks) == 1


@pytest.mark.parametrize(("way", "bits"), [("lora fp32", 32), ("lora bf16", 16), ("nf4", 4), ("int8", 8)])
def test_the_files_hold_the_weights_and_nothing_else(way: str, bits: int, base: Path, tmp_path: Path) -> None:
    _, streamer = streamed(base, tmp_path, **WAYS[way])
    sizes = [path.stat().st_size for path in sorted(tmp_path.iterdir())]
    matrices = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128
    assert sizes == [matrices * bits // 8] * BLOCKS
    assert streamer.stored_bytes == sum(sizes)


@pytest.mark.parametrize(
    ("spare", "resident"), [(-1, 0), (0, 0), (1, 0), (2.0, 2), (2.99, 2), (BLOCKS - 0.01, BLOCKS - 1), (BLOCKS, BLOCKS)]
)
def test_as_many_first_blocks_stay_as_fit(spare: float, resident: int, base: Path, tmp_path: Path) -> None:
    """`spare` is in blocks, beside what is outside of them; at 1 a byte is missing."""
    model = adapted(base)
    blocks = decoder_blocks(model)
    inside = {id(weight) for block in blocks for weight in block.parameters()}
    outside = sum(weight.nbytes for weight in model.parameters() if id(weight) not in inside)
    block = sum(weight.nbytes for weight in frozen(blocks[0]))
    limit = outside + int(spare * block) - (spare == 1)
    streamer = stream_beyond(model, device=CPU, limit=limit, folder=tmp_path)
    assert streamer.blocks == BLOCKS - resident
    assert [is_present(each) for each in blocks] == [True] * resident + [False] * (BLOCKS - resident)
    assert numbers(model, runs.settings())


def test_a_file_that_is_cut_short_is_named(base: Path, tmp_path: Path) -> None:
    model, _ = streamed(base, tmp_path)
    loss = TokenLoss(model)
    file = sorted(tmp_path.iterdir())[2]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(OSError) as refused:
        loss(pad_batch(runs.samples(2), pad=0))
    assert describe_os_error(refused.value) == f"{file} was cut short while it was in use"


def test_a_file_that_is_gone_is_named(base: Path, tmp_path: Path) -> None:
    model, _ = streamed(base, tmp_path)
    loss = TokenLoss(model)
    summed = loss(pad_batch(runs.samples(2), pad=0))
    file = sorted(tmp_path.iterdir())[1]
    file.unlink()
    with pytest.raises(OSError) as refused:
        summed.backward()
    assert describe_os_error(refused.value) == f"{file}: No such file or directory"


def test_a_disk_that_is_full_is_said_by_its_file(tiny_base: Path, tmp_path: Path) -> None:
    model = adapted(tiny_base)
    with small_disk(tmp_path / "disk") as disk:
        with pytest.raises(OSError) as refused:
            stream_beyond(model, device=CPU, limit=0, folder=disk)
        assert refused.value.errno == errno.ENOSPC
        assert f"the disk is full (writing {disk}/block-0000.bin)" in describe_os_error(refused.value)


def test_a_run_leaves_no_file_behind(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, int]] = []
    step = AdapterTrainer.training_step

    def looking(*given: Any) -> torch.Tensor:
        seen.append({path.name: path.stat().st_size for path in (tmp_path / "off/load").rglob("*.bin")})
        return step(*given)

    monkeypatch.setattr(AdapterTrainer, "training_step", looking)
    data = str(tiny.write_data(tmp_path / "data.jsonl"))
    asked = {**ON_DISK, "offload_folder": str(tmp_path / "off/load")}
    run = runs.settings(data=data, max_steps=2, offload=asked)
    places = Places(base=tiny_base, run=tmp_path / "run", tensorboard=None)
    trained = train_lora(places=places, settings=run, gpus=[])
    weights = sum(weight.numel() for weight in trained.model.parameters() if not weight.requires_grad)
    matrices = weights - 2 * 384 * 256 - 5 * 256
    assert [sum(sizes.values()) for sizes in seen] == [4 * matrices] * 2
    assert list((tmp_path / "off/load").iterdir()) == []


def test_a_run_that_fails_leaves_no_file_behind(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> torch.Tensor:
        assert len(list(tmp_path.rglob("*.bin"))) == 2
        raise TrainingError("for the test")

    monkeypatch.setattr(AdapterTrainer, "training_step", failing)
    data = str(tiny.write_data(tmp_path / "data.jsonl"))
    run = runs.settings(data=data, offload={**ON_DISK, "offload_folder": str(tmp_path)})
    with pytest.raises(TrainingError, match="for the test"):
        train_lora(places=Places(base=tiny_base, run=tmp_path / "run", tensorboard=None), settings=run, gpus=[])
    assert not list(tmp_path.rglob("*.bin"))
