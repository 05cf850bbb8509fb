"""What a model's logits are computed from: adapter, base and tokens, held against each other before they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.adapter_folder import CONFIG, WEIGHTS
from lib.checkpoint import checkpoint_files, is_embedding
from lib.jsonfile import read_json
from lib.loading import explain_loading
from lib.logits_file import LogitsError, LogitsFile
from lib.lora import read_lora, read_targets
from lib.manifest import identify_folder
from lib.merge_plan import plan_merge
from lib.safetensors_file import read_tensors
from lib.trained_model import TrainedModelError


def identify_adapter(
    adapter: Path | None, manifest: Path | None, *, base: Path, base_manifest: Path | None, threads: int
) -> dict[str, Any] | None:
    """
    Digest and origin of the adapter.

    Raises:
        TrainedModelError: its manifest tells of another base.
    """
    if adapter is None:
        return None
    found = identify_folder(adapter, manifest, artifact="adapter", names=lambda _: [CONFIG, WEIGHTS], threads=threads)
    expected = ((found["origin"] or {}).get("base") or {}).get("digest")
    if expected is not None:
        here = identify_folder(base, base_manifest, artifact="base", names=checkpoint_files, threads=threads)["digest"]
        if here != expected:
            raise TrainedModelError(
                f"{adapter} was not trained on {base}: its manifest names a base of digest {expected[:16]}…, and this "
                f"one has {here[:16]}…; name the base that it was trained on with --base"
            )
    return found


def check_fit(base: Path, adapter: Path | None, read: LogitsFile) -> int | None:
    """
    Hold adapter, base and tokens against each other, before anything large is loaded.

    Returns:
        The rows of embedding and output head, where the adapter changes them.

    Raises:
        LoraError: the adapter does not fit the base.
        LogitsError: the tokens are of another vocabulary.
    """
    updates, targets = (read_lora(adapter), {"is_target": read_targets(adapter)}) if adapter else ({}, {})
    config = read_json(base / "config.json")
    plan = plan_merge(read_tensors(base), updates, config, where=adapter or base, **targets)
    rows = next((tensor.rows for tensor in plan.tensors if is_embedding(tensor.name)), read.vocabulary)
    # A GGUF may leave out rows that no token has, and holds none that the model lacks.
    if read.vocabulary > rows or (read.vocabulary < rows and read.vocabulary < len(_tokenizer(base))):
        raise LogitsError(
            f"{read.path} is of a vocabulary of {read.vocabulary} tokens, and the model has {rows}; give logits that "
            "llama-perplexity wrote for a GGUF of this model"
        )
    return plan.config.get("vocab_size")


def start_token(base: Path, read: LogitsFile) -> int | None:
    """
    The token that llama-perplexity puts in place of each chunk's first, for vocabularies that begin texts with one.

    Whether a vocabulary does is llama.cpp's own decision, by the kind of tokenizer where its config does not say. Then
    that token begins the whole text as well, where nothing else can put it: llama-perplexity parses no special tokens.
    """
    first = int(read.tokens[0, 0])
    known = (_tokenizer(base).bos_token_id, read_json(base / "config.json").get("bos_token_id"))
    return first if first in known else None


def _tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    with explain_loading("tokenizer", base):
        return AutoTokenizer.from_pretrained(base, local_files_only=True)
