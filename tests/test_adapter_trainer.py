"""The trainer: gradients of split updates, out of memory, overflow, evaluation, checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import training_runs as runs
from small_disk import small_disk

from lib.adapter_trainer import AdapterTrainer
from lib.checkpoints import newest_checkpoint
from lib.samples import IGNORED, Sample
from lib.split_trainer import TrainingError


def step(base: Path, folder: Path, samples: list[Sample], **train: Any) -> AdapterTrainer:
    """A trainer that has computed the gradient of one update over these samples."""
    trained = runs.trainer(base, folder, runs.settings(per_device_train_batch_size=len(samples), **train))
    trained.loss = trained.training_step(trained.model, samples).item()
    return trained


def out_of_memory_above(trained: AdapterTrainer, rows: int) -> list[int]:
    """Let the model's memory hold that many samples at a time; returns the list of sizes tried."""
    tried, whole = [], trained.token_loss

    def limited(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        tried.append(len(batch["labels"]))
        loss = whole(batch)
        if tried[-1] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    trained.token_loss = limited
    return tried


@pytest.mark.parametrize("size", [1, 2, 4])
def test_split_gradient_is_that_of_the_whole_batch(size: int, tiny_base: Path, tmp_path: Path) -> None:
    samples = runs.samples(7)
    assert len({len(sample.input_ids) for sample in samples}) > 4
    whole = step(tiny_base, tmp_path, samples)
    split = step(tiny_base, tmp_path, samples, micro_batching={"micro_batch_size": size})
    assert split.loss == pytest.approx(whole.loss, rel=1e-6)
    for name, gradient in runs.gradients(whole).items():
        difference = (runs.gradients(split)[name] - gradient).norm() / gradient.norm()
        assert difference < 1e-6, name


def test_gradient_and_loss_are_those_of_transformers(tiny_base: Path, tmp_path: Path) -> None:
    """The model's own loss over one padded batch is the outside measure."""
    samples = runs.samples(5)
    ours = step(tiny_base, tmp_path, samples, micro_batching={"micro_batch_size": 2})
    model = runs.adapted(tiny_base, runs.settings())
    length = max(len(sample.input_ids) for sample in samples)
    ids = torch.tensor([sample.input_ids + [0] * (length - len(sample.input_ids)) for sample in samples])
    labels = torch.tensor([sample.labels + [IGNORED] * (length - len(sample.labels)) for sample in samples])
    mask = torch.tensor([[1] * len(sample.input_ids) + [0] * (length - len(sample.input_ids)) for sample in samples])
    theirs = model(input_ids=ids, labels=labels, attention_mask=mask).loss
    theirs.backward()
    assert ours.loss == pytest.approx(theirs.item(), rel=1e-6)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            difference = (runs.gradients(ours)[name] - weight.grad).norm() / weight.grad.norm()
            assert difference < 1e-5, name


def test_out_of_memory_in_the_middle_gives_the_undisturbed_gradient(tiny_base: Path, tmp_path: Path) -> None:
    """With dropout, so that a retry from another random state would show."""
    samples = runs.samples(6)
    dropout = {"lora": {"r": 4, "lora_dropout": 0.3}}
    split = runs.trainer(tiny_base, tmp_path, runs.settings(**dropout, micro_batching={"micro_batch_size": 1}))
    disturbed = runs.trainer(
        tiny_base, tmp_path, runs.settings(**dropout, micro_batching={"micro_batch_size": 4, "mb_backoff_factor": 4})
    )
    tried = out_of_memory_above(disturbed, rows=1)
    for each in (split, disturbed):
        torch.manual_seed(5)
        each.training_step(each.model, samples)
    assert tried == [4] + [1] * 6
    assert disturbed.batcher.size == 1
    for name, gradient in runs.gradients(split).items():
        assert torch.equal(runs.gradients(disturbed)[name], gradient), name


def test_a_failure_in_a_later_part_drops_what_was_summed(tiny_base: Path, tmp_path: Path) -> None:
    samples = sorted(runs.samples(6), key=lambda sample: -len(sample.input_ids))
    trained = runs.trainer(tiny_base, tmp_path, runs.settings(micro_batching={"micro_batch_size": 2}))
    whole, calls = trained.token_loss, []

    def third_call_fails(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        calls.append(len(batch["labels"]))
        if len(calls) == 3:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
        return whole(batch)

    trained.token_loss = third_call_fails
    trained.training_step(trained.model, samples)
    assert calls == [2, 2, 2, 1, 1, 1, 1, 1, 1]
    plain = step(tiny_base, tmp_path, samples, micro_batching={"micro_batch_size": 1})
    for name, gradient in runs.gradients(plain).items():
        assert torch.equal(runs.gradients(trained)[name], gradient), name


def test_no_sample_is_skipped_or_counted_twice(tiny_base: Path, tmp_path: Path) -> None:
    """Over two epochs with gradient accumulation, memory running out in the middle of the run."""
    data = runs.samples(11)
    run = runs.settings(per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=2, save_steps=0)
    trained = runs.trainer(tiny_base, tmp_path, run, train_dataset=data)
    whole, seen = trained.training_step, []

    def noting(model: Any, inputs: list[Sample], items: Any = None) -> torch.Tensor:
        if trained.state.global_step == 2:
            out_of_memory_above(trained, rows=1)
        loss = whole(model, inputs, items)
        seen.extend(tuple(sample.input_ids) for sample in inputs)
        return loss

    trained.training_step = noting
    trained.train()
    assert trained.state.global_step == 6
    assert sorted(seen) == sorted([tuple(sample.input_ids) for sample in data] * 2)
    assert trained.batcher.size == 1


def test_evaluation_is_split_too_and_weighs_tokens_alike(tiny_base: Path, tmp_path: Path) -> None:
    held_out = runs.samples(5, seed=3)
    trained = runs.trainer(tiny_base, tmp_path, runs.settings(per_device_train_batch_size=4), eval_dataset=held_out)
    alone = [trained._sum_losses([[sample]]) for sample in held_out]
    tokens = sum(label != IGNORED for sample in held_out for label in sample.labels[1:])
    tried = out_of_memory_above(trained, rows=2)
    assert trained.evaluate()["eval_loss"] == pytest.approx(sum(alone) / tokens, rel=1e-6)
    assert tried == [4, 2, 2, 1]
    assert trained.model.training


def test_nan_names_the_step_and_the_kept_checkpoint(tiny_base: Path, tmp_path: Path) -> None:
    run = runs.settings(save_steps=2, per_device_train_batch_size=2, num_train_epochs=4)
    trained = runs.trainer(tiny_base, tmp_path, run)
    whole = trained.token_loss
    trained.token_loss = lambda batch: whole(batch) * (math.nan if trained.state.global_step == 4 else 1.0)
    with pytest.raises(TrainingError, match="loss is nan at step 5; the checkpoint at step 4 is kept"):
        trained.train()
    assert newest_checkpoint(tmp_path).name == "checkpoint-4"


def test_weights_that_are_not_finite_never_become_a_checkpoint(tiny_base: Path, tmp_path: Path) -> None:
    trained = runs.trainer(tiny_base, tmp_path, runs.settings(save_steps=1, learning_rate=1e38, max_grad_norm=0))
    with pytest.raises(TrainingError, match="not finite after step|loss is (nan|inf) at step"):
        trained.train()
    for kept in tmp_path.glob("checkpoint-*/trained.safetensors"):
        from safetensors.torch import load_file

        assert all(torch.isfinite(tensor).all() for tensor in load_file(kept).values())


def test_float16_overflow_lowers_the_scale_and_does_the_update_again(tiny_base: Path, tmp_path: Path) -> None:
    samples = runs.samples(4)
    exact = step(tiny_base, tmp_path, samples)
    half = runs.trainer(tiny_base, tmp_path, runs.settings(precision="fp16", per_device_train_batch_size=4))
    half.loss_scale = 2.0**40
    loss = half.training_step(half.model, samples).item()
    assert half.loss_scale < 2.0**30
    assert loss == pytest.approx(exact.loss, rel=1e-2)
    for name, gradient in runs.gradients(exact).items():
        got = runs.gradients(half)[name]
        assert torch.isfinite(got).all()
        assert (got - gradient).norm() / gradient.norm() < 0.05, name


def test_a_full_disk_leaves_the_checkpoint_before(tiny_base: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        run = runs.settings(save_steps=2, per_device_train_batch_size=2, num_train_epochs=4)
        trained = runs.trainer(tiny_base, disk / "run", run)
        save = trained._save_checkpoint

        def saving(model: Any, trial: Any) -> None:
            if trained.state.global_step == 4:
                with pytest.raises(OSError), (disk / "filler").open("wb", buffering=0) as filler:
                    while True:
                        filler.write(bytes(4096))
            save(model, trial)

        trained._save_checkpoint = saving
        with pytest.raises(
            TrainingError, match="disk is full: the checkpoint at step 4 .*checkpoint at step 2 is kept"
        ):
            trained.train()
        assert newest_checkpoint(disk / "run").name == "checkpoint-2"
        assert [path.name for path in (disk / "run").iterdir()] == ["checkpoint-2"]


def test_the_best_adapter_is_the_one_of_the_lowest_held_out_loss(tiny_base: Path, tmp_path: Path) -> None:
    run = runs.settings(
        eval_data="held.jsonl",
        load_best_model_at_end=True,
        eval_steps=1,
        save_steps=0,
        num_train_epochs=3,
        per_device_train_batch_size=3,
    )
    trained = runs.trainer(tiny_base, tmp_path, run, eval_dataset=runs.samples(3, seed=9))
    weights, measured, evaluate = {}, {}, trained.evaluate

    def noting(*given: Any, **named: Any) -> dict[str, float]:
        step = trained.state.global_step
        weights[step] = {name: weight.detach().clone() for name, weight in trained.trained.items()}
        measured[step] = evaluate(*given, **named)["eval_loss"]
        return {"eval_loss": measured[step]}

    trained.evaluate = noting
    trained.train()
    trained.take_best()
    best = min(measured, key=measured.get)
    assert trained.best == (measured[best], best)
    assert all(torch.equal(weight, weights[best][name]) for name, weight in trained.trained.items())


def test_a_checkpoint_holds_what_the_run_has_learned_about_memory(tiny_base: Path, tmp_path: Path) -> None:
    run = runs.settings(save_steps=1, max_steps=1, per_device_train_batch_size=4)
    trained = runs.trainer(tiny_base, tmp_path, run)
    out_of_memory_above(trained, rows=2)
    trained.train()
    progress = json.loads((tmp_path / "checkpoint-1/progress.json").read_text())
    assert progress["micro_batch_size"] == 2
    again = runs.trainer(tiny_base, tmp_path, run)
    again._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert again.batcher.size == 2
