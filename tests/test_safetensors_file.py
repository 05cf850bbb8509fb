"""Reading and writing safetensors, with the format's own library as the oracle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lib.checkpoint import INDEX, WEIGHTS, CheckpointError
from lib.safetensors_file import (
    BYTES_PER_VALUE,
    StoredTensor,
    index_of,
    plan_shards,
    read_columns,
    read_header,
    read_rows,
    read_tensors,
    shard_names,
    write_shard,
)

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHAPES = {"matrix": (5, 6), "vector": (7,), "scalar": (), "cube": (3, 2, 4), "wide": (1, 9), "tall": (9, 1)}


def values(shape: tuple[int, ...], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def written(folder: Path, tensors: dict[str, torch.Tensor], name: str = WEIGHTS) -> dict[str, StoredTensor]:
    """Tensors in a file that the library wrote, as our reader sees them."""
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return {tensor.name: tensor for tensor in read_header(folder / name)}


def blocks_of(tensors: Iterable[torch.Tensor], *, rows: int = 2) -> Iterator[torch.Tensor]:
    for tensor in tensors:
        flat = tensor.reshape(tensor.shape[0] if tensor.ndim else 1, -1)
        yield from flat.split(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_the_library_writes_is_read(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    first, second = values(shape, seed=1, dtype=DTYPES[dtype]), values((4, 3), seed=2, dtype=DTYPES[dtype])
    found = written(tmp_path, {"x": first, "a.b": second})
    assert found.keys() == {"x", "a.b"}
    tensor = found["x"]
    assert (tensor.dtype, tensor.shape, tensor.values) == (dtype, shape, first.numel())
    rows = read_rows(tensor, 0, tensor.rows)
    assert rows.shape == (tensor.rows, tensor.row_values)
    assert torch.equal(rows.reshape(shape), first)
    assert torch.equal(read_rows(found["a.b"], 0, 4), second)


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (2, 5), (4, 5), (0, 5), (1, 4)])
def test_some_rows(start: int, stop: int, tmp_path: Path) -> None:
    found = written(tmp_path, {"x": values((5, 6)), "y": values((5,), seed=1), "z": values((5, 2, 3), seed=2)})
    with safe_open(tmp_path / WEIGHTS, framework="pt") as library:
        for name, tensor in found.items():
            right = library.get_slice(name)[start:stop]
            assert torch.equal(read_rows(tensor, start, stop), right.reshape(stop - start, -1))


@pytest.mark.parametrize("rows", [(0, 5), (2, 3), (1, 4), (2, 2)])
@pytest.mark.parametrize("columns", [(0, 6), (0, 1), (5, 6), (2, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_some_columns(dtype: str, rows: tuple[int, int], columns: tuple[int, int], tmp_path: Path) -> None:
    whole = values((5, 6), dtype=DTYPES[dtype])
    tensor = written(tmp_path, {"x": whole, "y": values((3,))})["x"]
    assert torch.equal(read_columns(tensor, *rows, *columns), whole[slice(*rows), slice(*columns)])


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    found = list(written(tmp_path, {f"t{n}": values((n, 3)) for n in (3, 1, 2)}).values())
    assert [tensor.offset for tensor in found] == sorted(tensor.offset for tensor in found)


def test_a_type_that_no_merge_can_handle_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ids is I64; only F64, F32, F16, BF16"):
        written(tmp_path, {"ids": torch.arange(3), "x": values((2,))})


def raw(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file with any header, as damaged as a test likes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, end: int, *, shape: tuple[int, ...] = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


DAMAGED = {
    "not json": (b"{damaged", b""),
    "not text": (b"\xff\xfe{}", b""),
    "a list": ([], b""),
    "an entry that is no object": ({"x": 1}, b""),
    "no offsets": ({"x": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "no type": ({"x": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "no shape": ({"x": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "data cut off": ({"x": entry(0, 8)}, bytes(7)),
    "data too long": ({"x": entry(0, 8)}, bytes(9)),
    "shape too small": ({"x": entry(0, 8, shape=(1,)), "y": entry(8, 16)}, bytes(16)),
    "shape too large": ({"x": entry(0, 8, shape=(4,)), "y": entry(8, 16)}, bytes(16)),
    "a gap": ({"x": entry(0, 8), "y": entry(12, 20)}, bytes(20)),
    "overlapping": ({"x": entry(0, 8), "y": entry(4, 12)}, bytes(12)),
    "the same bytes twice": ({"x": entry(0, 8), "y": entry(0, 8)}, bytes(8)),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_refused_as_the_library_does(kind: str, tmp_path: Path) -> None:
    path = raw(tmp_path / WEIGHTS, *DAMAGED[kind])
    with pytest.raises(SafetensorError), safe_open(path, framework="pt"):
        pass
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_header(path)


@pytest.mark.parametrize("kept", [0, 5, 8, 30, -1])
def test_a_truncated_file(kept: int, tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS
    save_file({"x": values((4, 4))}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="cut off"):
        read_header(path)


def test_a_header_length_beyond_reason(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no safetensors file"):
        read_header(raw(tmp_path / WEIGHTS, b"{}", length=1 << 60))


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    tensor = written(tmp_path, {"x": values((4, 4))})["x"]
    path = tmp_path / WEIGHTS
    path.write_bytes(path.read_bytes()[:-4])
    assert read_rows(tensor, 0, 3).shape == (3, 4)
    with pytest.raises(CheckpointError, match="x cannot be read"):
        read_rows(tensor, 3, 4)


def sharded(folder: Path, shards: list[dict[str, torch.Tensor]], index: dict[str, int] | None = None) -> list[str]:
    """Shards that the library writes; `index` says which tensor is listed in which."""
    names = shard_names(len(shards))
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, folder / name)
    if index is None:
        index = {tensor: number for number, tensors in enumerate(shards) for tensor in tensors}
    weight_map = {tensor: names[number] for tensor, number in index.items()}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return names


def test_a_sharded_checkpoint_is_read(tmp_path: Path) -> None:
    names = sharded(tmp_path, [{"b": values((2, 2), seed=1)}, {"a": values((2, 2), seed=2)}])
    found = read_tensors(tmp_path)
    assert {name: tensor.file.name for name, tensor in found.items()} == {"b": names[0], "a": names[1]}


def test_an_index_that_disagrees_with_its_shards(tmp_path: Path) -> None:
    """Missing and surplus tensors are all listed."""
    sharded(tmp_path, [{"a": values((2,)), "b": values((2,))}, {"c": values((2,))}], {"a": 0, "d": 0, "e": 1})
    with pytest.raises(CheckpointError) as refused:
        read_tensors(tmp_path)
    assert [line.strip() for line in str(refused.value).splitlines()[1:]] == [
        f"d: in {INDEX} but in no shard",
        f"e: in {INDEX} but in no shard",
        f"b: in a shard but not in {INDEX}",
        f"c: in a shard but not in {INDEX}",
    ]


def test_a_missing_shard(tmp_path: Path) -> None:
    names = sharded(tmp_path, [{"a": values((2,))}, {"b": values((2,))}])
    (tmp_path / names[1]).unlink()
    with pytest.raises(CheckpointError, match=names[1]):
        read_tensors(tmp_path)


@pytest.mark.parametrize("place", [0, 1])
def test_a_tensor_in_two_shards_is_no_guess(place: int, tmp_path: Path) -> None:
    """Refused, or taken from where the index says."""
    names = sharded(tmp_path, [{"a": values((2,), seed=1)}, {"a": values((2,), seed=2), "b": values((2,))}])
    weight_map = {"a": names[place], "b": names[1]}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {**weight_map, "c": names[0]}}))
    save_file({"a": values((2,), seed=1), "c": values((2,))}, tmp_path / names[0])
    try:
        found = read_tensors(tmp_path)
    except CheckpointError as error:
        assert "a" in str(error)
    else:
        assert found["a"].file.name == names[place]


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_the_library_reads_what_we_write(dtype: str, tmp_path: Path) -> None:
    tensors = {name: values(shape, seed=n, dtype=DTYPES[dtype]) for n, (name, shape) in enumerate(SHAPES.items())}
    tensors["日本語"] = values((2, 3), seed=99, dtype=DTYPES[dtype])
    plan = [StoredTensor(name, "F32", tuple(each.shape), Path("elsewhere"), 0) for name, each in tensors.items()]
    path = tmp_path / "ours.safetensors"
    facts = write_shard(path, plan, dtype=dtype, blocks=blocks_of(tensors.values()))
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == DTYPES[dtype]
        assert torch.equal(loaded[name], tensor)
    with safe_open(path, framework="pt") as library:
        assert library.metadata() == {"format": "pt"}
    content = path.read_bytes()
    assert facts == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert int.from_bytes(content[:8], "little") % 8 == 0, "the data has to be aligned"


def test_the_same_blocks_make_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"a": values((6, 4)), "b": values((3,), seed=1)}
    plan = [StoredTensor(name, "F32", tuple(each.shape), Path("x"), 0) for name, each in tensors.items()]
    digests = {
        write_shard(tmp_path / f"{rows}", plan, dtype="F32", blocks=blocks_of(tensors.values(), rows=rows))["sha256"]
        for rows in (1, 2, 6)
    }
    assert len(digests) == 1


@pytest.mark.parametrize("change", ["too few", "too many", "another type"])
def test_blocks_that_do_not_fill_the_plan(change: str, tmp_path: Path) -> None:
    blocks = {
        "too few": [values((3, 4))],
        "too many": [values((3, 4)), values((2, 4))],
        "another type": [values((4, 4), dtype=torch.float16)],
    }[change]
    plan = [StoredTensor("x", "F32", (4, 4), Path("x"), 0)]
    with pytest.raises(CheckpointError, match=r"wrote \d+ bytes, the header implies \d+"):
        write_shard(tmp_path / WEIGHTS, plan, dtype="F32", blocks=iter(blocks))


def test_shards_are_split_as_the_hub_library_splits() -> None:
    """huggingface_hub's own splitter, on tensors that all fit into a shard."""
    from huggingface_hub import split_torch_state_dict_into_shards

    sizes = [(10, 4), (3,), (8, 8), (1, 1), (20, 3), (16, 4), (2, 2), (5, 5)]
    state = {f"layer.{n}.weight": torch.zeros(shape, dtype=torch.float16) for n, shape in enumerate(sizes)}
    plan = [StoredTensor(name, "F32", tuple(each.shape), Path("x"), 0) for name, each in state.items()]
    for limit in (128, 150, 200, 10_000):
        shards = plan_shards(plan, dtype="F16", max_shard_bytes=limit)
        theirs = split_torch_state_dict_into_shards(state, max_shard_size=limit)
        ours = dict(zip(shard_names(len(shards)), ([t.name for t in shard] for shard in shards), strict=True))
        assert ours == theirs.filename_to_tensors
        assert index_of(shards, dtype="F16")["metadata"]["total_size"] == theirs.metadata["total_size"]
        if theirs.is_sharded:
            assert index_of(shards, dtype="F16")["weight_map"] == theirs.tensor_to_filename


def test_a_tensor_larger_than_a_shard_stands_alone() -> None:
    plan = [StoredTensor(name, "F16", (size,), Path("x"), 0) for name, size in {"a": 2, "b": 50, "c": 2}.items()]
    shards = plan_shards(plan, dtype="F16", max_shard_bytes=20)
    assert [[tensor.name for tensor in shard] for shard in shards] == [["a"], ["b"], ["c"]]


def test_transformers_loads_a_checkpoint_that_we_wrote(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    torch.manual_seed(3)
    config = Qwen2Config(
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=False,
        dtype="float16",
    )
    model = Qwen2ForCausalLM(config).half()
    model.save_pretrained(theirs, max_shard_size="20KB")
    config.save_pretrained(ours)
    shards = plan_shards(read_tensors(theirs).values(), dtype="F16", max_shard_bytes=15_000)
    assert len(shards) > 2
    for name, shard in zip(shard_names(len(shards)), shards, strict=True):
        blocks = (read_rows(tensor, 0, tensor.rows) for tensor in shard)
        write_shard(ours / name, shard, dtype="F16", blocks=blocks)
    (ours / INDEX).write_text(json.dumps(index_of(shards, dtype="F16")))
    loaded, report = AutoModelForCausalLM.from_pretrained(ours, dtype=torch.float16, output_loading_info=True)
    assert {key: list(found) for key, found in report.items() if found} == {}
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_bytes_per_value_are_torchs() -> None:
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == BYTES_PER_VALUE
