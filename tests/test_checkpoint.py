"""Which files make up a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lib.checkpoint import INDEX, WEIGHTS, CheckpointError, checkpoint_files, weight_files, weight_map

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def shard(folder: Path, *names: str) -> Path:
    """Shards with an index of one tensor in each."""
    fill(folder, *names)
    index = {"metadata": {}, "weight_map": {f"w{number}": name for number, name in enumerate(names)}}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def test_one_file(tmp_path: Path) -> None:
    assert weight_files(fill(tmp_path, WEIGHTS)) == [WEIGHTS]


def test_shards_are_those_that_the_index_names(tmp_path: Path) -> None:
    folder = fill(shard(tmp_path, *reversed(SHARDS)), "consolidated.safetensors")
    assert weight_files(folder) == SHARDS
    assert weight_map(folder) == {"w0": SHARDS[1], "w1": SHARDS[0]}


def test_shards_beside_a_whole_file_are_no_guess(tmp_path: Path) -> None:
    """transformers, which trains, would load the whole file; a merge must not take other weights."""
    try:
        found = weight_files(fill(shard(tmp_path, *SHARDS), WEIGHTS))
    except CheckpointError as error:
        assert WEIGHTS in str(error)
    else:
        assert found == [WEIGHTS]


def test_every_missing_shard_is_named(tmp_path: Path) -> None:
    folder = shard(tmp_path, *SHARDS)
    for name in SHARDS:
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{SHARDS[0]}, {SHARDS[1]}"):
        weight_files(folder)


@pytest.mark.parametrize("content", ["{", "", "[]", "{}", '{"weight_map": null}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index(content: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickled_weights_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as refused:
        weight_files(fill(tmp_path, name))
    assert name in str(refused.value)
    assert "can run code when read" in str(refused.value)
    assert "convert them to safetensors" in str(refused.value)


def test_pickled_files_beside_safetensors_do_no_harm(tmp_path: Path) -> None:
    assert weight_files(fill(tmp_path, WEIGHTS, "training_args.bin", "pytorch_model.bin")) == [WEIGHTS]


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"neither {WEIGHTS} nor {INDEX}"):
        weight_files(fill(tmp_path, "config.json"))


def test_what_a_trainer_leaves_is_not_called_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        weight_files(fill(tmp_path, "training_args.bin", "optimizer.pt", "scheduler.pt"))


def test_files_of_a_checkpoint(tmp_path: Path) -> None:
    sides = ["LICENSE", "chat_template.jinja", "config.json", "generation_config.json", "merges.txt"]
    sides += ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    others = [
        "MANIFEST.json",
        "README.md",
        "modeling_own.py",
        "model.gguf",
        "original/config.json",
        "pytorch_model.bin",
    ]
    folder = fill(shard(tmp_path, *SHARDS), *sides, *others)
    assert checkpoint_files(folder) == sorted([*sides, *SHARDS, INDEX])


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        checkpoint_files(fill(tmp_path, WEIGHTS))
