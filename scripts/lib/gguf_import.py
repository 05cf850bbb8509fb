"""
A GGUF file turned back into a Hugging Face checkpoint that can be trained, merged and converted again.

The weights go through transformers' own GGUF loader. The tokenizer is built here: transformers 5 knows few of
the names in `tokenizer.ggml.pre` and splits text GPT-2's way for all others (SmolLM2's digits, for instance,
are no longer taken one by one). What each name means was read off llama.cpp (`src/llama-vocab.cpp` and
`src/unicode.cpp`, commit 0c1e57098b). Its token ids are the reference, even where a model's first tokenizer
gave others: llama.cpp does no Unicode normalisation, for one.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.console import say
from lib.errors import ModelmillError

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

DTYPES = ("float16", "bfloat16", "float32")
SHARD_SIZE = "5GB"  # what hub repositories use; one file `model.safetensors` below it

# Regular expressions in Oniguruma's dialect, the one `tokenizers` compiles. Its \s and llama.cpp's are the
# same 25 code points; \p{N} \p{L} \p{M} \p{P} \p{S} differ only in code points newer than Unicode 15.
SUFFIX = r"'(?:[sdmtSDMT]|[lL][lL]|[rR][eE]|[vV][eE])"
GAPS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'(?:[sdmt]|ll|re|ve)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _words(*, number: str, letter: str = r"\p{L}") -> str:
    """The split of Llama 3 and Qwen: words with the character before them, numbers, punctuation, gaps."""
    word = r"[^\r\n\p{L}\p{N}]?[" + letter + "]+"
    punctuation = r" ?[^\s\p{N}" + letter + r"]+[\r\n]*"
    return "|".join([SUFFIX, word, number, punctuation, GAPS])


def _cased_words(*, number: str, suffix: str) -> str:
    """
    The split of GPT-4o and Tekken, which cuts `HelloWorld` in two.

    llama.cpp tells upper from lower case for A-Z only; any other letter counts as both.
    """
    lead, upper, lower = r"[^\r\n\p{L}\p{N}]?", r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
    words = [f"{lead}{upper}*{lower}+{suffix}", f"{lead}{upper}+{lower}*{suffix}"]
    return "|".join([*words, number, r" ?[^\s\p{L}\p{N}]+[\r\n/]*", GAPS])


# DeepSeek's first tokenizers list their characters one by one. The letters are Unicode's cased ones without
# the ranges excluded here. llama.cpp finds no white space by such lists, not even U+3000 where it is listed.
DEEPSEEK_LETTER = (
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\x{560}-\x{588}\x{10C7}-\x{10FF}\x{1C80}-\x{1C8A}\x{2D00}-\x{2D2D}"
    r"\x{A790}-\x{A7FA}\x{AB30}-\x{AB68}\x{10570}-\x{105BC}\x{10D50}-\x{10D85}\x{16E40}-\x{1DF2A}]]"
)
DEEPSEEK_SIGN = r"[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3001}\x{3002}]"
DEEPSEEK_CJK = r"[\x{800}-\x{9FA5}\x{AC00}-\x{D7FF}&&\S]+"
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[\x{4E00}-\x{9FA5}\x{3040}-\x{30FF}]+",
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + GAPS,
)
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


@dataclass(frozen=True)
class PreTokenizer:
    """
    What one name in `tokenizer.ggml.pre` means.

    Attributes:
        splits: regular expressions, each applied to the pieces that the one before left; a match becomes a
            piece, and so does the text between two matches.
        ignore_merges: a piece that is a token is taken whole, even where no merges lead to it.
        add_bos: whether text starts with BOS when the file does not say (`tokenizer.ggml.add_bos_token`).
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


def _pre_tokenizers() -> dict[str, PreTokenizer]:
    """Name in `tokenizer.ggml.pre` → meaning; names on one line mean the same."""
    threes, ones = r"\p{N}{1,3}", r"\p{N}"
    families = {
        "gpt-2 phi-2 mpt olmo jais gigachat a.x-4.0 mellum exaone4 trillion granite-docling": PreTokenizer((GPT2,)),
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": PreTokenizer((ones, GPT2)),
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": PreTokenizer(
            (_words(number=threes),), ignore_merges=True, add_bos=True
        ),
        "glm4 glm5": PreTokenizer((_words(number=threes),), ignore_merges=True),
        "chatglm-bpe dbrx smaug-bpe": PreTokenizer((_words(number=threes),)),
        "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": PreTokenizer(
            (_words(number=ones),)
        ),
        "qwen35": PreTokenizer((_words(number=ones, letter=r"\p{L}\p{M}"),)),
        "gpt-4o llama4 kanana2 talkie minimax-m2": PreTokenizer(
            (_cased_words(number=threes, suffix=f"(?:{SUFFIX})?"),)
        ),
        "tekken": PreTokenizer((_cased_words(number=ones, suffix=""),), ignore_merges=True, add_bos=True),
        "deepseek-llm": PreTokenizer(
            (r"[\r\n]", rf"\s?{DEEPSEEK_LETTER}+", rf"\s?{DEEPSEEK_SIGN}+", r"\s+\z", DEEPSEEK_CJK, r"\p{N}+")
        ),
        "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_CJK, ones)),
        "deepseek-v3 hunyuan-dense joyai-llm hy_v4": PreTokenizer(DEEPSEEK_V3),
        "falcon": PreTokenizer((r"[\p{P}$+<=>^~|`]+", GPT2, r"[0-9]{3}")),
        "default": PreTokenizer((r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", r"[0-9]{3}")),
        "bloom poro-chat gpt3-finnish": PreTokenizer((BLOOM,)),
        "viking": PreTokenizer((BLOOM, ones)),
    }
    return {name: meaning for names, meaning in families.items() for name in names.split()}


PRE_TOKENIZERS = _pre_tokenizers()

# Token types of the GGUF format.
UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5

# llama.cpp ends generation on these, and takes them for control tokens whatever type the file gives them.
ALWAYS_CONTROL = frozenset(
    (
        "<|eot_id|> <|eom_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <|endoftext|> </s> <eos> "
        "<|end_of_text|> <end_of_utterance> <end_of_turn> <turn|> <|tool_response> <EOT> _<EOT> [EOT] [EOS] [e~[ "
        "<｜end▁of▁sentence｜>"
    ).split()
)

# Key in tokenizer_config.json → key in the GGUF.
NAMED_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # the format's own spelling
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}

# Rope settings that a GGUF keeps as tensors, and transformers' loader drops without a word.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

# Settings of config.json that name a folder or the library's version: no part of what the checkpoint is.
UNWANTED_SETTINGS = ("_name_or_path", "_model_name_or_path", "transformers_version")

# What gguf and transformers raise over a file that is damaged, or not of a kind they know.
BAD_FILE = (
    ValueError, KeyError, IndexError, TypeError, AttributeError, NotImplementedError, RuntimeError, OSError
)  # fmt: skip

# Scripts, digits, emoji with joiners, white space of many kinds: enough to tell two pre-tokenizers apart.
PROBE = (
    "Hello HelloWorld, it's 2026! 1234567 I'LL\tgo \u3000 東京タワーは333メートル。\n\n"
    "  def f(x):\n\treturn x**2 \nनमस्ते नाम Ünïcödé 👩\u200d🔬🚀 3.14 ＡＢＣ１２３ …--==\u00a0\u2003end \r\n "
)


class GgufImportError(ModelmillError):
    """A GGUF file that cannot be turned into a checkpoint without loss."""


@dataclass(frozen=True)
class GgufHeader:
    """
    A GGUF file's header.

    Attributes:
        path: the file.
        metadata: key → value, arrays as lists.
        elements: tensor name → number of weights.
    """

    path: Path
    metadata: dict[str, Any]
    elements: dict[str, int]

    @property
    def architecture(self) -> str:
        """llama.cpp's name for the model's architecture."""
        return str(self.metadata.get("general.architecture", "unknown"))

    def tokenizer(self, key: str, default: Any = None) -> Any:
        """The value of `tokenizer.ggml.{key}`."""
        return self.metadata.get(f"tokenizer.ggml.{key}", default)


@dataclass(frozen=True)
class Vocabulary:
    """
    A GGUF's byte-level BPE tokenizer, in the file's own terms.

    Attributes:
        tokens: text by id, byte-encoded where the type is normal.
        special: ids that are control tokens: always found whole in text, and left out of decoded answers.
        added: ids that are found whole in text as well, but are ordinary content.
        merges: pairs of token texts, most important first.
        pre: name of the pre-tokenizer.
        named: `bos_token` and so on → text.
        add_bos, add_eos: whether text is wrapped in them.
        settings: further keys of tokenizer_config.json.
    """

    tokens: tuple[str, ...]
    special: frozenset[int]
    added: frozenset[int]
    merges: tuple[tuple[str, str], ...]
    pre: str
    named: dict[str, str]
    add_bos: bool
    add_eos: bool
    settings: dict[str, Any]


def import_gguf(*, gguf: Path, output: Path, dtype: str) -> None:
    """
    Turn a GGUF file into a Hugging Face checkpoint folder.

    Written are config.json, generation_config.json, the weights (model.safetensors, or shards of at most 5 GB
    with an index), tokenizer.json, tokenizer_config.json and, when the file has a chat template,
    chat_template.jinja with the same text as in tokenizer_config.json. The same file gives the same bytes in
    any folder. Quantized weights are unpacked; the whole model is held in memory, in `dtype`.

    Args:
        gguf: a complete model in one file, with a byte-level BPE tokenizer.
        output: the folder to write to; made when missing. Weights of an earlier import are replaced.
        dtype: of the weights: float16, bfloat16 or float32.

    Raises:
        GgufImportError: if the file is damaged or incomplete, if its architecture or tokenizer is not known,
            or if something in it would be lost.
    """
    if dtype not in DTYPES:
        raise GgufImportError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    header = _read_header(gguf=gguf)
    vocabulary = _read_vocabulary(header=header)
    _refuse_lost_rope(header=header)
    backend = _build_tokenizer(vocabulary=vocabulary, path=gguf)
    size = f"{sum(header.elements.values()) / 1e6:.0f} M weights"
    say(f"importing {gguf}: {header.architecture}, {size}, pre-tokenizer {vocabulary.pre}")
    output.mkdir(parents=True, exist_ok=True)
    with _scratch_folder(parent=output) as checkpoint:
        _write_weights(header=header, vocabulary=vocabulary, checkpoint=checkpoint, dtype=dtype)
        _check_weights(header=header, checkpoint=checkpoint, dtype=dtype)
        _write_tokenizer(vocabulary=vocabulary, backend=backend, checkpoint=checkpoint)
        _check_tokenizer(vocabulary=vocabulary, backend=backend, checkpoint=checkpoint)
        _publish(checkpoint=checkpoint, output=output)


def _read_header(*, gguf: Path) -> GgufHeader:
    """Read a file's metadata and tensor table, and see that no tensor ends behind the end of the file."""
    from gguf import GGUFReader

    if not gguf.is_file():
        raise GgufImportError(f"{gguf}: no such file")
    with gguf.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise GgufImportError(f"{gguf}: not a GGUF file: it starts with {magic!r}, not b'GGUF'")
    try:
        reader = GGUFReader(gguf)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        elements = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    except BAD_FILE as error:
        raise GgufImportError(
            f"{gguf}: the GGUF file is cut short or damaged ({_first_line(error)}); fetch it again"
        ) from error
    parts = metadata.get("split.count", 1)
    if parts > 1:
        raise GgufImportError(f"{gguf}: one of {parts} parts; join them first, with llama-gguf-split --merge")
    return GgufHeader(path=gguf, metadata=metadata, elements=elements)


def _read_vocabulary(*, header: GgufHeader) -> Vocabulary:
    """Take the tokenizer out of the metadata, refusing kinds whose ids could not be reproduced."""
    tokens = _read_tokens(header=header)
    pre = _read_pre(header=header)
    special, added = _special_ids(header=header, tokens=tokens)
    named = _named_tokens(header=header, tokens=tokens)
    special |= {tokens.index(text) for text in named.values()}
    add_bos = bool(header.tokenizer("add_bos_token", PRE_TOKENIZERS[pre].add_bos))
    add_eos = bool(header.tokenizer("add_eos_token", False))
    for wanted, name in ((add_bos, "bos_token"), (add_eos, "eos_token")):
        if wanted and name not in named:
            raise GgufImportError(f"{header.path}: text is to be wrapped in a {name}, but the file has none")
    return Vocabulary(
        tokens=tokens,
        special=frozenset(special),
        added=frozenset(added - special),
        merges=_read_merges(header=header),
        pre=pre,
        named=named,
        add_bos=add_bos,
        add_eos=add_eos,
        settings=_tokenizer_settings(header=header),
    )


def _read_tokens(*, header: GgufHeader) -> tuple[str, ...]:
    """Token texts by id, without the padding at the end that the converter adds by itself."""
    model, texts = header.tokenizer("model"), header.tokenizer("tokens")
    if model is None or not texts:
        raise GgufImportError(f"{header.path}: no tokenizer in the file (tokenizer.ggml.model and .tokens)")
    if model != "gpt2":
        # A SentencePiece vocabulary has scores. tokenizer.json has no place for them, and llama.cpp's
        # converter would then write -1000 for every token: the finished model would cut text up differently.
        kind = " (SentencePiece)" if model == "llama" else ""
        raise GgufImportError(
            f"{header.path}: a tokenizer of kind {model!r}{kind} cannot be imported, only 'gpt2' (byte-level "
            "BPE) can; use the model's original checkpoint as base"
        )
    tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(texts)]  # as llama.cpp names them
    twice = [text for text, count in Counter(tokens).items() if count > 1]
    if twice:
        raise GgufImportError(f"{header.path}: tokens listed more than once: {twice[:5]}")
    types = header.tokenizer("token_type") or []
    for i in reversed(range(min(len(tokens), len(types)))):
        if types[i] != UNUSED or tokens[i] != f"[PAD{i}]":
            break
        tokens.pop()
    return tuple(tokens)


def _read_pre(*, header: GgufHeader) -> str:
    """The name of the pre-tokenizer; llama.cpp's default when the file has none."""
    pre = header.tokenizer("pre")
    if not pre:
        say(f"{header.path} does not name its pre-tokenizer; taking 'default', as llama.cpp does")
        return "default"
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise GgufImportError(f"{header.path}: pre-tokenizer {pre!r} is not known here; known are {known}")
    return pre


def _read_merges(*, header: GgufHeader) -> tuple[tuple[str, str], ...]:
    """Pairs of token texts; the first mention of a pair counts."""
    lines = header.tokenizer("merges")
    if not lines:
        raise GgufImportError(f"{header.path}: no merges in the file (tokenizer.ggml.merges)")
    pairs = {}
    for line in lines:
        cut = line.find(" ", 1)  # from 1, since a token may itself start with a space
        if cut < 0:
            raise GgufImportError(f"{header.path}: merge {line!r} is not two tokens with a space between")
        pairs[line[:cut], line[cut + 1 :]] = None
    return tuple(pairs)


def _special_ids(*, header: GgufHeader, tokens: tuple[str, ...]) -> tuple[set[int], set[int]]:
    """Ids of control tokens, and of tokens that users added."""
    types = header.tokenizer("token_type") or [1] * len(tokens)
    if len(types) < len(tokens):
        raise GgufImportError(f"{header.path}: {len(tokens)} tokens, but types for {len(types)} of them")
    special = {i for i, text in enumerate(tokens) if types[i] in (UNKNOWN, CONTROL) or text in ALWAYS_CONTROL}
    return special, {i for i in range(len(tokens)) if types[i] == USER_DEFINED}


def _named_tokens(*, header: GgufHeader, tokens: tuple[str, ...]) -> dict[str, str]:
    """`bos_token` and so on → text, for the ids the file names."""
    ids = {name: header.tokenizer(key) for name, key in NAMED_TOKENS.items()}
    named = {name: i for name, i in ids.items() if i is not None}
    wrong = [f"{name} {i}" for name, i in named.items() if not 0 <= i < len(tokens)]
    if wrong:
        raise GgufImportError(f"{header.path}: not among its {len(tokens)} tokens: {', '.join(wrong)}")
    return {name: tokens[i] for name, i in named.items()}


def _tokenizer_settings(*, header: GgufHeader) -> dict[str, Any]:
    """Keys of tokenizer_config.json that hold for the file as they are; keys it lacks stay away."""
    settings: dict[str, Any] = {
        "add_bos_token": header.tokenizer("add_bos_token"),
        "add_eos_token": header.tokenizer("add_eos_token"),
        "add_prefix_space": header.tokenizer("add_space_prefix"),
        "chat_template": header.metadata.get("tokenizer.chat_template"),
        "model_max_length": header.metadata.get(f"{header.architecture}.context_length"),
    }
    others = header.metadata.get("tokenizer.chat_templates")
    if others:
        say(f"left out: the chat templates {', '.join(others)}; the default one is kept")
    return {key: value for key, value in settings.items() if value is not None}


def _refuse_lost_rope(*, header: GgufHeader) -> None:
    """Stop at rope settings that live in tensors: without them long texts go wrong, and nothing says so."""
    lost = [name for name in ROPE_TENSORS if name in header.elements]
    if lost:
        raise GgufImportError(
            f"{header.path}: its rope scaling is kept in {', '.join(lost)}, which transformers does not "
            "read; use the model's original checkpoint as base"
        )


def _build_tokenizer(*, vocabulary: Vocabulary, path: Path) -> Tokenizer:
    """Build a tokenizer that gives llama.cpp's ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    vocab = {text: i for i, text in enumerate(vocabulary.tokens)}
    orphans = [pair for pair in vocabulary.merges if not {*pair, "".join(pair)} <= vocab.keys()]
    if orphans:
        raise GgufImportError(f"{path}: merges of or into something that is no token: {orphans[:5]}")
    meaning = PRE_TOKENIZERS[vocabulary.pre]
    model = models.BPE(vocab=vocab, merges=list(vocabulary.merges), ignore_merges=meaning.ignore_merges)
    backend = Tokenizer(model)
    backend.pre_tokenizer = _pre_tokenizer(meaning=meaning, tokens=vocabulary.tokens)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [
            AddedToken(vocabulary.tokens[i], normalized=False, special=i in vocabulary.special)
            for i in sorted(vocabulary.special | vocabulary.added)
        ]
    )
    _wrap_text(vocabulary=vocabulary, backend=backend)
    return backend


def _pre_tokenizer(*, meaning: PreTokenizer, tokens: tuple[str, ...]) -> Any:
    """The splits, then bytes spelt as characters."""
    from tokenizers import Regex, pre_tokenizers

    steps = [pre_tokenizers.Split(Regex(split), "isolated") for split in meaning.splits]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    absent = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(tokens))
    if absent:
        # llama.cpp drops such a byte, but never merges across it, as `tokenizers` would.
        codes = "".join(rf"\x{{{ord(character):X}}}" for character in absent)
        steps.append(pre_tokenizers.Split(Regex(f"[{codes}]"), "removed"))
    return pre_tokenizers.Sequence(steps)


def _wrap_text(*, vocabulary: Vocabulary, backend: Tokenizer) -> None:
    """Add BOS and EOS the way transformers does from `add_bos_token`, so that file and library agree."""
    from tokenizers import processors

    if not (vocabulary.add_bos or vocabulary.add_eos):
        return
    before = [vocabulary.named["bos_token"]] if vocabulary.add_bos else []
    after = [vocabulary.named["eos_token"]] if vocabulary.add_eos else []
    single = [*(f"{text}:0" for text in before), "$A:0", *(f"{text}:0" for text in after)]
    second = [*(f"{text}:1" for text in before), "$B:1", *(f"{text}:1" for text in after)]
    backend.post_processor = processors.TemplateProcessing(
        single=single,
        pair=single + second,
        special_tokens=[(text, vocabulary.tokens.index(text)) for text in dict.fromkeys(before + after)],
    )


def _write_weights(*, header: GgufHeader, vocabulary: Vocabulary, checkpoint: Path, dtype: str) -> None:
    """Unpack the weights into safetensors, with config.json and generation_config.json."""
    with _library_quiet():
        model, report = _load_model(header=header, dtype=dtype)
        _check_model(header=header, vocabulary=vocabulary, model=model, report=report)
        model.save_pretrained(checkpoint, max_shard_size=SHARD_SIZE)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in UNWANTED_SETTINGS}
    _refuse_lost_scaling(header=header, config=config)
    _write_json(path=checkpoint / "config.json", content=config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    _write_json(path=checkpoint / "generation_config.json", content=ids)
    for file in checkpoint.glob("*.safetensors"):
        shutil.copymode(checkpoint / "config.json", file)  # safetensors lets only the owner read


def _load_model(*, header: GgufHeader, dtype: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """
    Load the weights with transformers.

    It gets to see the file alone in a folder: it would also take up an adapter that happens to lie beside the
    GGUF, and prefers a file of the same name in the working directory.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig, __version__

    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder, "model.gguf")
        alone.symlink_to(header.path.absolute())
        try:
            return AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=str(alone),
                quantization_config=GgufConfig(dequantize=True),
                dtype=getattr(torch, dtype),
                output_loading_info=True,
                local_files_only=True,
            )
        except BAD_FILE as error:
            raise GgufImportError(
                f"{header.path}: transformers {__version__} cannot load this GGUF of architecture "
                f"{header.architecture!r}: {_first_line(error)}"
            ) from error


def _check_model(*, header: GgufHeader, vocabulary: Vocabulary, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """See that no weight was left at random, and that there is a row of embeddings for every token."""
    missing = sorted(report["missing_keys"])
    misfits = sorted(str(key) for key in report["mismatched_keys"])
    if missing or misfits:
        raise GgufImportError(
            f"{header.path}: tensors that the model needs are missing: {', '.join(missing) or 'none'}; "
            f"have another shape: {', '.join(misfits) or 'none'}"
        )
    tokens, rows = len(vocabulary.tokens), model.get_input_embeddings().weight.shape[0]
    if tokens > rows or rows != model.config.vocab_size:
        raise GgufImportError(
            f"{header.path}: {tokens} tokens, {rows} rows of embeddings and a vocab_size of "
            f"{model.config.vocab_size} do not fit together"
        )


def _refuse_lost_scaling(*, header: GgufHeader, config: dict[str, Any]) -> None:
    """Stop if the file stretches its context and the checkpoint would not."""
    asked = header.metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    kept = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if asked not in ("none", kept.get("rope_type")):
        raise GgufImportError(
            f"{header.path}: transformers does not carry over its rope scaling ({asked}); "
            "use the model's original checkpoint as base"
        )


def _check_weights(*, header: GgufHeader, checkpoint: Path, dtype: str) -> None:
    """Reopen the weights: all finite, all of the wanted type, as many as in the GGUF."""
    import torch
    from safetensors import safe_open

    faults, count = [], 0
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118, a shard is no mapping
                tensor = shard.get_tensor(name)
                count += tensor.numel()
                faults += _faults(name=name, tensor=tensor, dtype=getattr(torch, dtype))
    if faults:
        raise GgufImportError(f"{header.path}: not fit to be written as {dtype}: {'; '.join(faults)}")
    held = sum(header.elements.values())
    if count != held:
        raise GgufImportError(
            f"{header.path}: it holds {held} weights, but transformers makes {count} of them, so something "
            "would be lost; use the model's original checkpoint as base"
        )


def _faults(*, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> list[str]:
    """What is wrong with one tensor."""
    faults = []
    if tensor.dtype != dtype:
        faults.append(f"{name} is {tensor.dtype}")
    if not bool(tensor.isfinite().all()):
        faults.append(f"{name} has values that are not finite")
    return faults


def _write_tokenizer(*, vocabulary: Vocabulary, backend: Tokenizer, checkpoint: Path) -> None:
    """Write the tokenizer's files."""
    config = {
        **vocabulary.named,
        **vocabulary.settings,
        "clean_up_tokenization_spaces": False,
        # The class that takes tokenizer.json as it is. Those of the model families, LlamaTokenizer for one,
        # put a pre-tokenizer of their own in its place.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if vocabulary.add_bos:
        config["add_bos_token"] = True
    backend.save(str(checkpoint / "tokenizer.json"))
    _write_json(path=checkpoint / "tokenizer_config.json", content=config)
    template = vocabulary.settings.get("chat_template")
    if template is not None:
        # Bytes, so that no line end is changed: the two copies have to be equal.
        (checkpoint / "chat_template.jinja").write_bytes(template.encode())


def _check_tokenizer(*, vocabulary: Vocabulary, backend: Tokenizer, checkpoint: Path) -> None:
    """
    Load the tokenizer as users will, and compare its ids with those of the one that was built.

    For model type qwen2 transformers loads Qwen2Tokenizer whatever tokenizer_config.json says. It splits as
    `qwen2` and `deepseek-r1-qwen` do, but composes decomposed accents first, which llama.cpp does not.
    """
    from transformers import AutoTokenizer

    found_whole = (vocabulary.tokens[i] for i in sorted(vocabulary.special | vocabulary.added))
    text = PROBE + " x1".join(found_whole)
    with _library_quiet():
        loaded = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
        ids = loaded.encode(text)
    if ids != backend.encode(text).ids:
        raise GgufImportError(
            f"AutoTokenizer loads the imported tokenizer (pre-tokenizer {vocabulary.pre}) as a "
            f"{type(loaded).__name__}, which gives other ids; use the model's original checkpoint as base"
        )


def _publish(*, checkpoint: Path, output: Path) -> None:
    """Move the finished files to their place, and weights of an earlier import out of the way."""
    names = {file.name for file in checkpoint.iterdir()}
    for pattern in ("model*.safetensors", "model.safetensors.index.json", "chat_template.jinja"):
        for file in output.glob(pattern):
            if file.name not in names:
                file.unlink()
    for name in sorted(names):
        os.replace(checkpoint / name, output / name)


@contextmanager
def _scratch_folder(*, parent: Path) -> Iterator[Path]:
    """An empty folder in `parent` for unfinished files; what an interrupted run left there is removed."""
    folder = parent / ".incomplete"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _library_quiet() -> Iterator[None]:
    """Hide transformers' warnings, and its bars where they would fill a log with carriage returns."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    unseen = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    try:
        with unseen:
            yield
    finally:
        logging.set_verbosity(before)


def _write_json(*, path: Path, content: dict[str, Any]) -> None:
    """Write JSON with sorted keys."""
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def _first_line(error: BaseException) -> str:
    """What a library's error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
