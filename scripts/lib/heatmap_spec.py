"""Heatmap models of config.yaml: typed objects, and what their sections cannot say."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.config import definition, find_mistakes, suggest
from lib.config_checks import check_folder, check_micro_batching, check_origin
from lib.heatmap_settings import ClipUse, Evaluation, Heatmap, TrainHeatmap
from lib.jsonfile import read_json
from lib.train_method import MethodError, resolve_heatmap_method

VIT, FPN = "vit_heatmap", "convnext_fpn_heatmap"
# The numbers that a backbone of either kind is counted by.
NUMBERS = {VIT: ("hidden_size", "num_hidden_layers", "patch_size"), FPN: ("depths", "hidden_sizes")}
LABELS = "game*/Clip*/Label.csv"


@dataclass(frozen=True)
class HeatmapBase:
    """Where the backbone comes from; `shape` are its numbers, wherever they stand."""

    hub: str | None
    revision: str | None
    path: str | None
    random: Mapping[str, Any] | None
    seed: int
    shape: Mapping[str, Any]


@dataclass(frozen=True)
class Synthetic:
    """Clips that are drawn."""

    games: int
    clips: int
    frames: int
    size: tuple[int, int]
    seed: int


@dataclass(frozen=True)
class Clips(ClipUse):
    """Where the clips come from, and how they are used."""

    path: str | None
    synthetic: Synthetic | None

    @property
    def use(self) -> ClipUse:
        """What is handed on to scripts beside the folder."""
        return ClipUse(eval_games=self.eval_games, invisible=self.invisible, occluded=self.occluded)


@dataclass(frozen=True)
class AdapterHeatmap:
    """How the model is trained."""

    train: TrainHeatmap


@dataclass(frozen=True)
class MergeHeatmap:
    """How the trained model is written."""

    dtype: str


@dataclass(frozen=True)
class HeatmapModel:
    """A heatmap model of config.yaml."""

    kind: str
    base: HeatmapBase
    clips: Clips
    heatmap: Heatmap
    adapter: AdapterHeatmap
    merge: MergeHeatmap
    evaluation: Evaluation


def resolve_heatmap(where: str, model: dict[str, Any], hardware: dict[str, Any] | None) -> Iterator[str]:
    """
    Settle in place what depends on files and on other sections of a heatmap model, and tell what is wrong with it.

    Args:
        where: the model's place in the config.
        model: with its defaults, without the sections that hold mistakes.
        hardware: the section; None if that holds a mistake, or something in the model may mean another section.
    """
    if "base" in model:
        yield from _resolve_base(f"{where}.base", model["base"])
        if model["base"]["shape"] and "heatmap" in model:
            yield from _check_kind(where, model)
    if "clips" in model:
        yield from _check_clips(f"{where}.clips", model["clips"])
    if "heatmap" in model:
        yield from _check_decoder(f"{where}.heatmap", model["heatmap"])
    if {"clips", "heatmap"} <= model.keys():
        yield from _check_sequences(where, model)
    if "adapter" in model and hardware:
        yield from _resolve_training(f"{where}.adapter.train", model, hardware)


def backbone_rules() -> dict[str, Any]:
    """The part of the schema for the config of a backbone."""
    return definition("heatmap_base")["properties"]["random"]


def _resolve_base(where: str, base: dict[str, Any]) -> Iterator[str]:
    """Check the base, and set `shape` to the numbers that the estimates need, by the schema's keys for them."""
    yield from check_origin(where, base)
    said = f"{where}.{'random' if base['random'] is not None else 'shape'}"
    published = base["random"] if base["random"] is not None else base["shape"]
    if base["path"] is not None and os.path.isfile(file := Path(base["path"], "config.json")):
        said, published = f"{where}.path", _read_backbone(file)
        if published is None:
            yield f"{said}: {file} describes no backbone: it has no model_type, or numbers that are none"
    known = backbone_rules()["properties"]
    base["shape"] = published and {key: value for key, value in published.items() if key in known}
    if base["shape"] and not any(all(base["shape"].get(key) for key in keys) for keys in NUMBERS.values()):
        yield f"{said}: gives neither {_listed(NUMBERS[VIT])} of a ViT nor {_listed(NUMBERS[FPN])} of a ConvNeXt"
        base["shape"] = None
    if base["random"] is not None and base["shape"]:
        yield from _check_heads(said, base["shape"])


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _read_backbone(path: Path) -> dict[str, Any] | None:
    """What a published config.json says; None if that is no backbone's."""
    try:
        published = read_json(path)
    except (ValueError, OSError):
        return None
    return None if find_mistakes(published, backbone_rules()) else published


def _check_heads(where: str, shape: Mapping[str, Any]) -> Iterator[str]:
    width, heads = shape.get("hidden_size"), shape.get("num_attention_heads")
    if width and heads and width % heads:
        yield f"{where}.num_attention_heads: {width} of hidden_size are no multiple of {heads}; give a divisor"
    depths, widths = shape.get("depths"), shape.get("hidden_sizes")
    if depths and widths and len(depths) != len(widths):
        yield f"{where}: depths has {len(depths)} entries and hidden_sizes {len(widths)}; each stage has one of both"


def _check_kind(where: str, model: Mapping[str, Any]) -> Iterator[str]:
    """Whether the backbone is of the kind that the model's decoder takes."""
    shape, chosen = model["base"]["shape"], model["heatmap"]["model"]
    if lacking := [key for key in NUMBERS[chosen] if not shape.get(key)]:
        other = FPN if chosen == VIT else VIT
        yield (
            f"{where}.heatmap.model: {chosen} needs a backbone with {_listed(lacking)}, which the base "
            f"({shape['model_type']}) does not have; take {other}, or another base"
        )


def _check_clips(where: str, clips: dict[str, Any]) -> Iterator[str]:
    """Whether the clips are there in TrackNet's layout, with the games that are held out."""
    if clips["path"] is not None:
        missing = list(check_folder(f"{where}.path", clips["path"]))
        yield from missing
        games = sorted({path.parts[-3] for path in Path(clips["path"]).glob(LABELS)}) if not missing else []
        if not missing and not games:
            yield (f"{where}.path: {clips['path']} has no {LABELS}, TrackNet's layout; name the folder above game1")
    else:
        games = [f"game{number + 1}" for number in range(clips["synthetic"]["games"])]
    for name in clips["eval_games"] if games else ():
        if name not in games:
            yield f"{where}.eval_games: there is no {name}{suggest(name, games)}"
    if games and set(games) <= set(clips["eval_games"]):
        yield f"{where}.eval_games: every game is held out, and none is left to learn from; take one out"


def _check_decoder(where: str, heatmap: Mapping[str, Any]) -> Iterator[str]:
    channels, factors = heatmap["channels"], heatmap["factors"]
    if len(channels) != len(factors):
        yield (
            f"{where}: channels has {len(channels)} entries and factors {len(factors)}; each stage of the decoder has "
            "one of both, so give as many"
        )


def _check_sequences(where: str, model: Mapping[str, Any]) -> Iterator[str]:
    drawn, frames = model["clips"]["synthetic"], model["heatmap"]["frames"]
    if drawn is not None and drawn["frames"] < frames:
        yield (
            f"{where}.heatmap.frames: {frames} are looked at together, and clips.synthetic.frames draws "
            f"{drawn['frames']} of each clip; lower this, or raise that"
        )


def _resolve_training(where: str, model: dict[str, Any], hardware: dict[str, Any]) -> Iterator[str]:
    train = model["adapter"]["train"]
    try:
        resolve_heatmap_method(train, gpus=hardware["gpus"])
    except MethodError as error:
        yield from (f"{where}: {line}" for line in str(error).splitlines())
    yield from check_micro_batching(where, train)
    if train["load_best_model_at_end"] and "clips" in model and not model["clips"]["eval_games"]:
        yield f"{where}.load_best_model_at_end: needs held-out games to tell which is best; set clips.eval_games"
