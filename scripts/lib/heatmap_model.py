"""TrackNet's models: a backbone of transformers, a decoder that makes a heatmap of its features, and a head."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lib.errors import ModelmillError
from lib.heatmap_settings import Heatmap, InputPlan

VIT, FPN = "vit_heatmap", "convnext_fpn_heatmap"
# transformers' types that take pictures of any size and give a token for each patch, after those of their own.
VITS = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
# Of a group of GroupNorm (Wu and He 2018 found 16 and more channels a group to do).
GROUP_CHANNELS = 16
COLOURS = 3
# What an untrained head says everywhere: a ball at so few of its places.
FIRST_LOGIT = -4.6


class HeatmapError(ModelmillError):
    """A heatmap model cannot be made as configured, or of such a backbone."""


class HeatmapModel(nn.Module):
    """
    Frames in, heatmap logits out.

    With several frames a 1×1 convolution mixes them into one picture first; untrained it passes on the last one.
    """

    def __init__(self, backbone: nn.Module, settings: Heatmap) -> None:
        """
        Args:
            backbone: a model of transformers without a head.
            settings: of what is around it.

        Raises:
            HeatmapError: the backbone is not of the kind that `settings.model` needs.
        """
        super().__init__()
        self.settings = settings
        self.config = backbone.config
        self.backbone = without_pooler(backbone)
        self.mixer = _mixer(settings.frames) if settings.frames > 1 else None
        self.decoder = _vit_decoder(backbone, settings) if settings.model == VIT else _pyramid(backbone, settings)
        self.head = nn.Conv2d(self.decoder.out_channels, 1, kernel_size=1)
        nn.init.constant_(self.head.bias, FIRST_LOGIT)

    def forward(self, frames: Tensor) -> Tensor:
        """
        Compute heatmaps.

        Args:
            frames: (batch, frames · 3, height, width), normalised, the frame that is asked about last.

        Returns:
            Logits, (batch, height, width) of the heatmap, float32.
        """
        pixels = self.mixer(frames) if self.mixer is not None else frames
        logits = self.head(self.decoder(self.features(pixels)))
        width, height = self.settings.heatmap_size
        if logits.shape[-2:] != (height, width):
            logits = functional.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
        return logits.squeeze(1).float()

    def features(self, pixels: Tensor) -> list[Tensor]:
        """What the backbone says, as maps (batch, channels, rows, columns), the finest first."""
        if self.settings.model == FPN:
            states = self.backbone(pixels, output_hidden_states=True).hidden_states
            return list(states[-len(self.decoder.widths) :])
        resized = tuple(pixels.shape[-2:]) != _sides(self.config.image_size)
        extra = {"interpolate_pos_encoding": True} if resized and self.config.model_type == "vit" else {}
        tokens = self.backbone(pixels, **extra).last_hidden_state
        rows, columns = (size // patch_size(self.config) for size in pixels.shape[-2:])
        # The class token and registers come first.
        patches = tokens[:, -rows * columns :]
        return [patches.transpose(1, 2).unflatten(2, (rows, columns))]

    def gradient_checkpointing_enable(self, **how: Any) -> None:
        self.backbone.gradient_checkpointing_enable(**how)


def _sides(size: int | Sequence[int]) -> tuple[int, ...]:
    """Height and width, of a config that may give one number for both."""
    return (size, size) if isinstance(size, int) else tuple(size)


def without_pooler(backbone: Any) -> Any:
    """A backbone without the layer that makes one vector of all patches, which some have and no heatmap needs."""
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None
    return backbone


def patch_size(config: Any) -> int:
    """What the sides of the input have to be multiples of."""
    if hasattr(config, "patch_size") and hasattr(config, "depths"):
        return config.patch_size * 2 ** (len(config.depths) - 1)
    size = getattr(config, "patch_size", 32)
    return size if isinstance(size, int) else max(size)


def plan_input(config: Any, processor: dict[str, Any], size: Sequence[int]) -> InputPlan:
    """
    The input for a backbone: the nearest multiples of its patch size, normalised as its processor says.

    Args:
        config: of the backbone.
        processor: its preprocessor_config.json; ImageNet's mean and deviation where it says none.
        size: width and height asked for.
    """
    patch = patch_size(config)
    width, height = (max(patch, int(side / patch + 0.5) * patch) for side in size)
    if not processor.get("do_normalize", True):
        return InputPlan(width, height, mean=(0.0,) * COLOURS, std=(1.0,) * COLOURS)
    mean = processor.get("image_mean") or (0.485, 0.456, 0.406)
    std = processor.get("image_std") or (0.229, 0.224, 0.225)
    return InputPlan(width, height, mean=tuple(mean), std=tuple(std))


def _mixer(frames: int) -> nn.Conv2d:
    mixer = nn.Conv2d(COLOURS * frames, COLOURS, kernel_size=1)
    with torch.no_grad():
        mixer.weight.zero_()
        mixer.bias.zero_()
        for colour in range(COLOURS):
            mixer.weight[colour, COLOURS * (frames - 1) + colour] = 1
    return mixer


def _vit_decoder(backbone: nn.Module, settings: Heatmap) -> UpsamplingDecoder:
    if _kind(backbone) not in VITS:
        raise HeatmapError(f"heatmap.model {VIT} needs a backbone of {', '.join(VITS)}, found {_kind(backbone)}")
    return UpsamplingDecoder(backbone.config.hidden_size, settings)


def _pyramid(backbone: nn.Module, settings: Heatmap) -> FeaturePyramid:
    widths = getattr(backbone.config, "hidden_sizes", None)
    if not widths:
        raise HeatmapError(f"heatmap.model {FPN} needs a backbone of stages as ConvNeXt's, found {_kind(backbone)}")
    return FeaturePyramid(widths, settings)


def _kind(backbone: nn.Module) -> str:
    return getattr(backbone.config, "model_type", type(backbone).__name__)


class UpsamplingDecoder(nn.Module):
    """A patch grid made finer, stage by stage."""

    def __init__(self, width: int, settings: Heatmap) -> None:
        """
        Args:
            width: channels of the patches.
            settings: `channels` and `factors` have an entry for each stage.
        """
        super().__init__()
        widths = [width, *settings.channels]
        self.stages = nn.Sequential(
            *(
                UpsamplingStage(widths[stage], widths[stage + 1], factor, settings)
                for stage, factor in enumerate(settings.factors)
            )
        )
        self.out_channels = widths[-1]
        self.factor = prod(settings.factors)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Maps of `out_channels`, finer by `factor`."""
        return self.stages(features[0])


class UpsamplingStage(nn.Module):
    """A 1×1 projection, which gives each place its finer ones, and a residual block over them."""

    def __init__(self, inner: int, outer: int, factor: int, settings: Heatmap) -> None:
        super().__init__()
        self.project = nn.Conv2d(inner, outer * factor**2, kernel_size=1)
        self.refine = nn.PixelShuffle(factor)
        self.block = ResidualBlock(outer, settings)

    def forward(self, features: Tensor) -> Tensor:
        return self.block(self.refine(self.project(features)))


class ResidualBlock(nn.Module):
    """Depthwise 3×3, norm, GELU and 1×1, with squeeze-excite (Hu et al. 2018) where asked for, added to its input."""

    def __init__(self, channels: int, settings: Heatmap) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels)
        self.norm = make_norm(settings.norm, channels)
        self.pointwise = nn.Conv2d(channels, channels, kernel_size=1)
        self.gate = SqueezeExcite(channels) if settings.squeeze_excite else None

    def forward(self, features: Tensor) -> Tensor:
        change = self.pointwise(functional.gelu(self.norm(self.depthwise(features))))
        return features + (change if self.gate is None else self.gate(change))


class SqueezeExcite(nn.Module):
    """Scales each channel by what all places say together."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(8, channels // 4)
        self.squeeze, self.excite = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        mean = features.mean((2, 3), keepdim=True)
        return features * torch.sigmoid(self.excite(functional.gelu(self.squeeze(mean))))


class FeaturePyramid(nn.Module):
    """
    A backbone's stages brought together at the finest (Lin et al. 2017).

    Each is projected by 1×1; from the coarsest down they are added, or put side by side, and refined by 3×3.
    """

    def __init__(self, widths: Sequence[int], settings: Heatmap) -> None:
        """
        Args:
            widths: channels of the stages, the finest first.
            settings: `fpn_channels` of every level, and how they are brought together.
        """
        super().__init__()
        channels, self.widths, self.concatenated = settings.fpn_channels, tuple(widths), settings.fusion == "concat"
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, kernel_size=1) for width in widths)
        inner = channels * (2 if self.concatenated else 1)
        self.refine = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inner, channels, kernel_size=3, padding=1), make_norm(settings.norm, channels), nn.GELU()
            )
            for _ in widths[:-1]
        )
        self.out_channels = channels

    def forward(self, features: list[Tensor]) -> Tensor:
        """Maps of `out_channels`, as fine as the first of `features`."""
        levels = [project(level) for project, level in zip(self.lateral, features, strict=True)]
        above = levels[-1]
        for level, refine in zip(levels[-2::-1], list(self.refine)[::-1], strict=True):
            finer = functional.interpolate(above, size=level.shape[-2:], mode="nearest")
            above = refine(torch.cat([level, finer], dim=1) if self.concatenated else level + finer)
        return above


def make_norm(kind: str, channels: int) -> nn.Module:
    """GroupNorm (gn), whose result depends on no other sample of a batch, or BatchNorm (bn)."""
    if kind == "bn":
        return nn.BatchNorm2d(channels)
    groups = max(1, channels // GROUP_CHANNELS)
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels)
