"""One training run: load the base as the method says, attach the adapter, let transformers' Trainer work."""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.console import Progress, note, progress, say
from lib.dataset import IGNORED, DataError, Sample, encode_conversation, read_conversations
from lib.errors import ModelmillError, first_line
from lib.train_settings import Train

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor


class TrainingError(ModelmillError):
    """A training run cannot start or must not go on."""


def fix_threads(threads: int) -> None:
    """
    Use exactly this many threads for arithmetic; to be called before torch is imported.

    Snakemake exports OMP_NUM_THREADS and its kin by its own count, and a CPU adapter's bytes depend on it.
    """
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
        os.environ[variable] = str(threads)
    # Beside another busy process, threads that spin while they wait take the core from the one waited for:
    # on 2 busy cores a step was seen at 2.8 s with this and at 6.0 s without, though under unlike load.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    import torch

    torch.set_num_threads(threads)


def train_lora(*, base: Path, data: Path, settings: Train, scratch: Path) -> PeftModel:
    """
    Train an adapter.

    Args:
        base: folder of the base checkpoint.
        data: JSONL file of conversations.
        settings: of the run.
        scratch: folder for what the Trainer writes.

    Returns:
        The model with its trained adapter.

    Raises:
        DataError: the data cannot be used with this base's chat template.
        TrainingError: the device is not there, or the base cannot be loaded.
    """
    from transformers import set_seed

    _quieten_transformers()
    samples = encode_samples(base=base, data=data, max_length=settings.max_length)
    set_seed(settings.seed)
    model = attach_adapter(load_base(base, settings), settings)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    say(f"training {trainable:,} weights by {settings.method} on {settings.device}, {settings.threads} threads")
    _fit(model, samples, settings, scratch)
    return model


def _quieten_transformers() -> None:
    """Its own bars are noise where there is no terminal, and its deprecation notices are for us, not for users."""
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def encode_samples(*, base: Path, data: Path, max_length: int) -> list[Sample]:
    """Read, render and encode the training data; says how much of it was cut."""
    from transformers import AutoTokenizer

    with _loading("tokenizer", base):
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    if not tokenizer.chat_template:
        raise DataError(f"{base} has no chat template: conversations cannot be rendered for it")
    samples = [encode_conversation(tokenizer, each, max_length=max_length) for each in read_conversations(data)]
    cut = [sample for sample in samples if sample.cut]
    if cut:
        say(f"{len(cut)} of {len(samples)} conversations are longer than max_length {max_length} and were cut")
    unlearnable = [i for i, sample in enumerate(samples, start=1) if all(label == IGNORED for label in sample.labels)]
    if unlearnable:
        raise DataError(
            f"{data}: max_length {max_length} cuts all that the assistant says in conversations "
            f"{unlearnable[:20]}; raise it"
        )
    tokens = sum(len(sample.input_ids) for sample in samples)
    learned = sum(label != IGNORED for sample in samples for label in sample.labels)
    say(f"{len(samples)} conversations, {tokens} tokens, {learned} of them said by the assistant")
    return samples


def load_base(base: Path, settings: Train) -> Any:
    """Load the base for training, its linear layers in 4 bits for qlora."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise TrainingError("train.device is cuda, but there is no usable GPU; set train.device: cpu")
    dtype = getattr(torch, settings.dtype)
    quantization = None
    if settings.method == "qlora":
        asked = settings.quantization
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=asked.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=asked.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=getattr(torch, asked.bnb_4bit_compute_dtype),
        )
    with _loading("weights", base):
        return AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            quantization_config=quantization,
            device_map="auto" if settings.device == "cuda" else {"": "cpu"},
            local_files_only=True,
            trust_remote_code=False,
        )


@contextmanager
def _loading(what: str, base: Path) -> Iterator[None]:
    """
    Say of a base that transformers refuses which folder it is; the library's own errors seldom do.

    It checks little itself: a damaged file ends in whatever exception its reading happens to meet, a plain
    one from the tokenizers library, or a KeyError, TypeError, RuntimeError, SafetensorError and others.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        note(traceback.format_exc())
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise TrainingError(f"{base}: transformers cannot load its {what} ({reason}); check the files there") from error


def attach_adapter(model: Any, settings: Train) -> PeftModel:
    """Freeze the base and put LoRA on the named layers, or on every linear layer but the output head."""
    from peft import LoraConfig, get_peft_model

    lora = settings.lora
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=sorted(lora.target_modules) or "all-linear",
        use_rslora=lora.use_rslora,
    )
    model.config.use_cache = False
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise TrainingError(f"train.lora: {error}") from error


def pad_batch(samples: Sequence[Sample], *, pad: int) -> dict[str, Tensor]:
    """Stack samples, padded on the right to the longest: input_ids, attention_mask, labels, each (batch, length)."""
    import torch

    length = max(len(sample.input_ids) for sample in samples)

    def stack(rows: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (length - len(row)) for row in rows], dtype=torch.long)

    return {
        "input_ids": stack([sample.input_ids for sample in samples], pad),
        "attention_mask": stack([[1] * len(sample.input_ids) for sample in samples], 0),
        "labels": stack([sample.labels for sample in samples], IGNORED),
    }


def _fit(model: PeftModel, samples: list[Sample], settings: Train, scratch: Path) -> None:
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    arguments = TrainingArguments(
        output_dir=str(scratch),
        use_cpu=settings.device == "cpu",
        num_train_epochs=settings.num_train_epochs,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=settings.device == "cuda",
    )
    pad = model.config.pad_token_id or 0
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=samples,
        data_collator=lambda batch: pad_batch(batch, pad=pad),
        callbacks=[_progress_callback(samples)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def _progress_callback(samples: list[Sample]) -> Any:
    """A callback that shows steps, loss and speed; the tokens of an average batch stand for each."""
    from transformers import TrainerCallback

    class ShowProgress(TrainerCallback):
        bar: Progress
        started: float

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.shown = progress("training", total=state.max_steps, unit="step")
            self.bar = self.shown.__enter__()
            self.started = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                speed = self._tokens_seen(state) / (time.monotonic() - self.started)
                remark = f"loss {float(logs['loss']):.3f}, {speed:.0f} tokens/s"
                self.bar.advance(remark=remark)
                note(f"step {state.global_step} of {state.max_steps}: {remark}, lr {logs['learning_rate']:.3g}")

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.close()

        def _tokens_seen(self, state: Any) -> float:
            return state.epoch * sum(len(sample.input_ids) for sample in samples)

    return ShowProgress()
