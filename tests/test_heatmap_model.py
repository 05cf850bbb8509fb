"""Heatmap models: what comes out for every backbone and option, each place of it from the same of the frame."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_heatmap import BACKBONES, make_backbone, make_model, make_settings
from torch import nn
from transformers import AutoConfig, AutoModel

from lib.heatmap_model import FPN, VIT, HeatmapError, HeatmapModel, make_norm, patch_size, plan_input

VITS = [kind for kind in BACKBONES if "convnext" not in kind]
PYRAMIDS = [kind for kind in BACKBONES if "convnext" in kind]


def frames_for(model: HeatmapModel, *, batch: int = 2, size: tuple[int, int] = (96, 64)) -> torch.Tensor:
    plan = plan_input(model.config, {}, size)
    torch.manual_seed(1)
    return torch.randn(batch, 3 * model.settings.frames, plan.height, plan.width)


def compute(model: HeatmapModel, frames: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(frames)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"norm": "bn"},
    {"squeeze_excite": True},
    {"heatmap_size": (33, 19)},
    {"frames": 3},
    {"channels": (24, 16, 8), "factors": (2, 1, 4)},
    {"channels": (8,), "factors": (1,), "norm": "bn", "squeeze_excite": True},
    {"fusion": "concat"},
    {"fusion": "concat", "fpn_channels": 24, "norm": "bn"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", BACKBONES)
def test_every_backbone_with_every_option(kind: str, options: dict[str, Any]) -> None:
    model = make_model(kind, **options)
    frames = frames_for(model)
    logits = compute(model, frames)
    width, height = model.settings.heatmap_size
    assert logits.shape == (2, height, width) and logits.dtype == torch.float32
    assert logits.isfinite().all() and logits.std() > 0
    # Of a batch each is its own.
    torch.testing.assert_close(compute(model, frames[1:]), logits[1:], atol=1e-4, rtol=1e-4)


def patches_by_hand(kind: str, backbone: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """The tokens of patches, by the layout that transformers documents: class token, then registers, then patches."""
    extra = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    tokens = backbone(pixels, **extra).last_hidden_state
    registers = getattr(backbone.config, "num_register_tokens", 0)
    assert registers == (4 if kind in ("dinov2_with_registers", "dinov3_vit") else 0)
    rows, columns = (side // backbone.config.patch_size for side in pixels.shape[-2:])
    patches = tokens[:, 1 + registers :]
    assert patches.shape[1] == rows * columns
    return torch.stack([patches[:, row * columns : (row + 1) * columns] for row in range(rows)], dim=1)


@pytest.mark.parametrize("kind", VITS)
def test_class_and_register_tokens_are_dropped(kind: str) -> None:
    model = make_model(kind)
    pixels = frames_for(model)
    with torch.no_grad():
        (features,) = model.features(pixels)
        expected = patches_by_hand(kind, model.backbone, pixels)
    torch.testing.assert_close(features, expected.permute(0, 3, 1, 2), rtol=0, atol=0)


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("place", [(0, 0), (0, 5), (2, 1), (3, 4)])
def test_a_change_of_the_frame_shows_at_its_place(kind: str, place: tuple[int, int]) -> None:
    """Rows stay rows and columns columns, through backbone, decoder and head."""
    model = make_model(kind, heatmap_size=(60, 40))
    side = 14 if "dinov2" in kind else 16
    torch.manual_seed(2)
    frames = torch.randn(1, 3, *((56, 84) if side == 14 else (64, 96)))
    row, column = place
    changed = frames.clone()
    changed[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side] = 3.0
    difference = (compute(model, changed) - compute(model, frames))[0].abs()
    weight = difference.unflatten(0, (4, 10)).unflatten(2, (6, 10)).sum((1, 3))
    assert divmod(int(weight.argmax()), 6) == place


@pytest.mark.parametrize("kind", PYRAMIDS)
def test_levels_of_the_pyramid_are_the_stages(kind: str) -> None:
    model = make_model(kind)
    with torch.no_grad():
        levels = model.features(torch.randn(1, 3, 64, 96))
    assert [tuple(level.shape[1:]) for level in levels] == [(8, 16, 24), (16, 8, 12), (24, 4, 6), (32, 2, 3)]


def test_the_pyramid_adds_or_joins_from_the_coarsest() -> None:
    """By hand: 1×1, twice as fine by repetition, sum or side by side, 3×3, norm, GELU."""
    for fusion in ("sum", "concat"):
        pyramid = make_model("convnext", fusion=fusion).decoder
        levels = [torch.randn(1, width, 16 // 2**n, 16 // 2**n) for n, width in enumerate((8, 16, 24, 32))]
        above = pyramid.lateral[3](levels[3])
        for number in (2, 1, 0):
            finer, level = (
                above.repeat_interleave(2, 2).repeat_interleave(2, 3),
                pyramid.lateral[number](levels[number]),
            )
            convolution, norm, _ = pyramid.refine[number]
            joined = level + finer if fusion == "sum" else torch.cat([level, finer], dim=1)
            above = nn.functional.gelu(norm(convolution(joined)))
        torch.testing.assert_close(pyramid(levels), above)


def test_the_decoder_gives_each_place_its_finer_ones() -> None:
    """Its stage before the block: of a patch's projected channels, the finer places of that patch alone."""
    stage = make_model("vit", channels=(8,), factors=(4,)).decoder.stages[0]
    grid = torch.zeros(1, 32, 3, 5)
    grid[0, :, 1, 2] = 1
    fine = stage.refine(stage.project(grid)) - stage.refine(stage.project(torch.zeros_like(grid)))
    assert fine.shape == (1, 8, 12, 20)
    inside = fine[:, :, 4:8, 8:12]
    assert inside.abs().min() > 0 and fine.abs().sum().item() == pytest.approx(inside.abs().sum().item())


@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_untrained_the_last_of_several_frames_is_passed_on(kind: str) -> None:
    several, one = make_model(kind, frames=3), make_model(kind)
    one.load_state_dict({name: each for name, each in several.state_dict().items() if not name.startswith("mixer")})
    frames = frames_for(several)
    torch.testing.assert_close(compute(several, frames), compute(one, frames[:, 6:]), rtol=0, atol=0)
    other = frames.clone()
    other[:, :6] = 0
    torch.testing.assert_close(compute(several, other), compute(several, frames), rtol=0, atol=0)


def test_all_frames_are_learned_from() -> None:
    model = make_model("vit", frames=2)
    model(frames_for(model)).sum().backward()
    assert model.mixer.weight.grad.flatten(1).ne(0).all(dim=0).all()


@pytest.mark.parametrize("kind", BACKBONES)
def test_an_untrained_head_says_that_balls_are_rare(kind: str) -> None:
    """Of TrackNet's frames a ball fills about a hundredth; from one half, the first steps would only unlearn that."""
    model = HeatmapModel(make_backbone(kind), make_settings(kind)).eval()
    assert compute(model, frames_for(model)).sigmoid().mean() == pytest.approx(0.01, abs=0.01)


@pytest.mark.parametrize("kind", BACKBONES)
def test_every_part_is_trained(kind: str) -> None:
    model = make_model(kind, squeeze_excite=True).train()
    model(frames_for(model)).square().mean().backward()
    lacking = {name for name, each in model.named_parameters() if each.grad is None or not each.grad.isfinite().all()}
    # What no heatmap depends on: of the backbone only, the mask of its own training, and its pooled class token.
    assert all(name.startswith("backbone.") for name in lacking)
    # The norm after the stages is for the pooled features.
    unused = ("mask_token", "pooler", "backbone.layernorm", "backbone.layer_norm")
    assert not [name for name in lacking if not any(part in name for part in unused)]


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = make_model("vit").train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(frames_for(model)).square().mean().backward()
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("kind", "size"),
    [("vit", (512, 288)), ("dinov2", (518, 294)), ("dinov3_vit", (512, 288)), ("convnext", (512, 288))],
)
def test_input_is_of_the_nearest_multiples_of_the_patch(kind: str, size: tuple[int, int]) -> None:
    plan = plan_input(AutoConfig.for_model(**BACKBONES[kind]), {}, (512, 288))
    assert (plan.width, plan.height) == size


@pytest.mark.parametrize(("asked", "size"), [((7, 1), (14, 14)), ((21, 20), (28, 14)), ((20, 35), (14, 42))])
def test_nearest_is_up_at_the_half_and_never_nothing(asked: tuple[int, int], size: tuple[int, int]) -> None:
    plan = plan_input(AutoConfig.for_model(**BACKBONES["dinov2"]), {}, asked)
    assert (plan.width, plan.height) == size


@pytest.mark.parametrize(("kind", "patch"), [("vit", 16), ("dinov2", 14), ("dinov3_vit", 16), ("convnext", 32)])
def test_patch_sizes(kind: str, patch: int) -> None:
    assert patch_size(AutoConfig.for_model(**BACKBONES[kind])) == patch


def test_frames_are_normalised_as_the_processor_says() -> None:
    config = AutoConfig.for_model(**BACKBONES["vit"])
    assert plan_input(config, {}, (64, 48)).mean == (0.485, 0.456, 0.406)
    said = plan_input(config, {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}, (64, 48))
    assert (said.mean, said.std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    none = plan_input(config, {"do_normalize": False, "image_mean": [0.5] * 3}, (64, 48))
    assert (none.mean, none.std) == ((0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(("channels", "groups"), [(8, 1), (16, 1), (40, 2), (48, 3), (50, 2), (64, 4), (256, 16)])
def test_groups_of_the_norm_divide_the_channels(channels: int, groups: int) -> None:
    norm = make_norm("gn", channels)
    assert isinstance(norm, nn.GroupNorm) and norm.num_groups == groups
    assert isinstance(make_norm("bn", channels), nn.BatchNorm2d)


@pytest.mark.parametrize("norm", ["gn", "bn"])
def test_samples_of_a_batch_in_training(norm: str) -> None:
    """With GroupNorm none depends on another, so that splitting a batch changes nothing; with BatchNorm all do."""
    model = make_model("vit", norm=norm).train()
    frames = frames_for(model)
    alone, together = compute(model, frames[:1]), compute(model, frames)[:1]
    assert torch.allclose(alone, together, atol=1e-4) == (norm == "gn")


OTHERS = {
    "swin": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]},
    "deit": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
}


@pytest.mark.parametrize(
    ("model", "kind", "said"),
    [
        (VIT, "convnext", "vit_heatmap needs a backbone of vit, dinov2, .*, found convnext"),
        (VIT, "swin", "found swin"),
        (VIT, "deit", "found deit"),
        (FPN, "vit", "convnext_fpn_heatmap needs a backbone of stages as ConvNeXt's, found vit"),
        (FPN, "dinov3_vit", "found dinov3_vit"),
    ],
)
def test_a_backbone_of_another_kind_is_refused(model: str, kind: str, said: str) -> None:
    if kind in OTHERS:
        backbone = AutoModel.from_config(AutoConfig.for_model(kind, **OTHERS[kind]))
    else:
        backbone = make_backbone(kind)
    with pytest.raises(HeatmapError, match=said):
        HeatmapModel(backbone, make_settings(kind, model=model))
