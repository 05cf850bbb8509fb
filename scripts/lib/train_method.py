"""Which training method a run uses: what the settings say, and what `auto` and left-out ones come to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lib.config import fill_by_method
from lib.errors import ModelmillError

BILLION = 1_000_000_000
GIB = 1 << 30
# bitsandbytes' own names for two of the methods.
FLAGS = {"qlora": "load_in_4bit", "int8": "load_in_8bit"}


class MethodError(ModelmillError):
    """Settings of a training run contradict each other."""


def resolve_method(train: dict[str, Any], *, parameters: int, gpus: Sequence[float]) -> None:
    """
    Settle `method`, `device`, `precision` and `learning_rate`, and say why in `method_reason`.

    Args:
        train: the section of the config, with every key; changed in place.
        parameters: weights of the base.
        gpus: memory of each planned GPU in GiB; none plans for the CPU.

    Raises:
        MethodError: 4-bit and 8-bit at once, or another method than they say; held-out data named twice, or
            needed and not named; a line for each.
    """
    problems = list(_held_out_problems(train))
    _settle_device(train, gpus)
    if not (both := list(_both_flags(train))):
        _settle(train, parameters, gpus)
        problems += _flag_problems(train, train["method_reason"])
    if problems := [*problems, *both]:
        raise MethodError("\n".join(problems))
    fill_by_method("train", train)


def resolve_heatmap_method(train: dict[str, Any], *, gpus: Sequence[float]) -> None:
    """
    Settle the device of a heatmap model's training, and what depends on it and on the method.

    Args:
        train: the section `train_heatmap` of the config, with every key; changed in place, also where it raises.
        gpus: see `resolve_method`.

    Raises:
        MethodError: the method is another than the flags say, or has no use for what they say; a line for each.
    """
    _settle_device(train, gpus)
    fill_by_method("train_heatmap", train)
    problems = list(_both_flags(train)) or list(_flag_problems(train, "as configured, or the default"))
    if not train["lora"]["enabled"] and train["method"] != "int8":
        problems.append(
            f"lora.enabled: false is for a frozen 8-bit backbone, and method is {train['method']}; take method: int8, "
            "or leave the adapter on"
        )
    if train["quantization"]["llm_int8_enable_fp32_cpu_offload"]:
        problems.append(
            "quantization.llm_int8_enable_fp32_cpu_offload is for language models; take offload.use_cpu_offload"
        )
    if problems:
        raise MethodError("\n".join(problems))


def _settle_device(train: dict[str, Any], gpus: Sequence[float]) -> None:
    if train["device"] == "auto":
        train["device"] = "cuda" if gpus else "cpu"


def _both_flags(train: dict[str, Any]) -> Iterator[str]:
    if all(train["quantization"][flag] for flag in FLAGS.values()):
        yield "quantization: load_in_4bit and load_in_8bit are both true; take one"


def _held_out_problems(train: dict[str, Any]) -> Iterator[str]:
    if train["eval_data"] is not None and train["eval_fraction"]:
        yield "eval_data and eval_fraction both say what is held out; take one"
    if train["load_best_model_at_end"] and train["eval_data"] is None and not train["eval_fraction"]:
        yield "load_best_model_at_end needs held-out data: set eval_data or eval_fraction"


def _settle(train: dict[str, Any], parameters: int, gpus: Sequence[float]) -> None:
    """What `method` says, or where that is auto the library's flags, or else the size of model and cards."""
    asked = train["method"]
    if asked == "auto":
        asked = next((method for method, flag in FLAGS.items() if train["quantization"][flag]), "auto")
    train["method_reason"] = "as configured"
    if asked == "auto":
        planned = [] if train["device"] == "cpu" else list(gpus)
        asked, precision, reason = _choose(parameters, planned)
        train["method_reason"] = reason + _excess(parameters, planned)
        if train.get("precision") is None:
            train["precision"] = precision
    train["method"] = asked


def _flag_problems(train: dict[str, Any], reason: str) -> Iterator[str]:
    for method, flag in FLAGS.items():
        said = train["quantization"][flag]
        if said is not None and said != (train["method"] == method):
            yield (
                f"method is {train['method']} ({reason}), but quantization.{flag} is "
                f"{str(said).lower()}; they have to agree"
            )


def _choose(parameters: int, gpus: Sequence[float]) -> tuple[str, str | None, str]:
    """Method, precision (None: the method's own) and the reason, by size and by the smallest planned card."""
    size = f"{parameters / BILLION:.1f} B weights"
    if not gpus:
        large = parameters > 2 * BILLION
        precision, limit = ("bf16", "more than 2 B") if large else ("fp32", "at most 2 B")
        return "lora", precision, f"auto: no GPU planned, {size} ({limit}: {precision})"
    card = min(gpus)
    for least, most, memory in ((6, 10, 16), (2.5, 6, 8)):
        if least * BILLION <= parameters <= most * BILLION:
            if card >= memory:
                return "int8", None, f"auto: {size}, smallest planned GPU {card:g} GiB (at least {memory})"
            return "qlora", None, f"auto: {size}, smallest planned GPU {card:g} GiB (less than {memory})"
    return "qlora", None, f"auto: {size}, smallest planned GPU {card:g} GiB"


def _excess(parameters: int, gpus: Sequence[float]) -> str:
    """What 16 bits would come to, where no planned cards hold that; others find out when loading fails."""
    size, held = 2 * parameters / 1e9, sum(gpus) * GIB / 1e9
    return f"; {size:.1f} GB in 16 bits do not fit the {held:.1f} GB of all GPUs" if 0 < held < size else ""
