"""
The tokenizer of a GGUF file, read from its header and built again as a tokenizer.json.

It is built here because transformers 5 does not keep a file's pre-tokenizer (lib.pre_tokenizers). llama.cpp's
token ids are the reference, even where a model's first tokenizer gave others: llama.cpp does no Unicode
normalisation, for one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.console import say
from lib.errors import ModelmillError
from lib.gguf_file import GgufFile
from lib.jsonfile import write_json
from lib.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

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

# Scripts, digits, emoji with joiners, white space of many kinds: enough to tell two pre-tokenizers apart.
PROBE = (
    "Hello HelloWorld, it's 2026! 1234567 I'LL\tgo \u3000 東京タワーは333メートル。\n\n"
    "  def f(x):\n\treturn x**2 \nनमस्ते नाम Ünïcödé 👩\u200d🔬🚀 3.14 ＡＢＣ１２３ …--==\u00a0\u2003end \r\n "
)


class GgufImportError(ModelmillError):
    """A GGUF file that cannot be turned into a checkpoint without loss."""


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


def read_vocabulary(*, header: GgufFile) -> Vocabulary:
    """
    Take the tokenizer out of the metadata.

    Raises:
        GgufImportError: there is none, it contradicts itself, or its kind's ids could not be reproduced.
    """
    tokens = _read_tokens(header=header)
    pre = _read_pre(header=header)
    special, added = _special_ids(header=header, tokens=tokens)
    named = _named_tokens(header=header, tokens=tokens)
    if plain := [f"{name} {text!r}" for name, text in named.items() if tokens.index(text) not in special | added]:
        # llama.cpp would find such a token only where merges lead to it, and tokenizers everywhere in text.
        raise GgufImportError(f"{header.path}: named as special, but typed as ordinary text: {', '.join(plain)}")
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


def _read_tokens(*, header: GgufFile) -> tuple[str, ...]:
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


def _read_pre(*, header: GgufFile) -> str:
    """The name of the pre-tokenizer; llama.cpp's default when the file has none."""
    pre = header.tokenizer("pre")
    if not pre:
        say(f"{header.path} does not name its pre-tokenizer; taking 'default', as llama.cpp does")
        return "default"
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise GgufImportError(f"{header.path}: pre-tokenizer {pre!r} is not known here; known are {known}")
    return pre


def _read_merges(*, header: GgufFile) -> tuple[tuple[str, str], ...]:
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


def _special_ids(*, header: GgufFile, tokens: tuple[str, ...]) -> tuple[set[int], set[int]]:
    """Ids of control tokens, and of tokens that users added."""
    types = header.tokenizer("token_type") or [1] * len(tokens)
    if len(types) < len(tokens):
        raise GgufImportError(f"{header.path}: {len(tokens)} tokens, but types for {len(types)} of them")
    special = {i for i, text in enumerate(tokens) if types[i] in (UNKNOWN, CONTROL) or text in ALWAYS_CONTROL}
    return special, {i for i in range(len(tokens)) if types[i] == USER_DEFINED}


def _named_tokens(*, header: GgufFile, tokens: tuple[str, ...]) -> dict[str, str]:
    """`bos_token` and so on → text, for the ids the file names."""
    ids = {name: header.tokenizer(key) for name, key in NAMED_TOKENS.items()}
    named = {name: i for name, i in ids.items() if i is not None}
    wrong = [f"{name} {i}" for name, i in named.items() if not 0 <= i < len(tokens)]
    if wrong:
        raise GgufImportError(f"{header.path}: not among its {len(tokens)} tokens: {', '.join(wrong)}")
    return {name: tokens[i] for name, i in named.items()}


def _tokenizer_settings(*, header: GgufFile) -> dict[str, Any]:
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


def build_tokenizer(*, vocabulary: Vocabulary, path: Path) -> Tokenizer:
    """
    Build a tokenizer that gives llama.cpp's ids.

    Raises:
        GgufImportError: merges of texts that are no tokens; `path`, the file, is named in the message.
    """
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


def write_tokenizer(*, vocabulary: Vocabulary, backend: Tokenizer, checkpoint: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and, when there is a chat template, chat_template.jinja."""
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
    write_json(checkpoint / "tokenizer_config.json", config)
    template = vocabulary.settings.get("chat_template")
    if template is not None:
        # Bytes, so that no line end is changed: the two copies have to be equal.
        (checkpoint / "chat_template.jinja").write_bytes(template.encode())


def check_tokenizer(*, vocabulary: Vocabulary, backend: Tokenizer, checkpoint: Path) -> None:
    """
    Load the tokenizer as users will, and compare its ids with those of the one that was built.

    For model type qwen2 transformers loads Qwen2Tokenizer whatever tokenizer_config.json says. It splits as
    `qwen2` and `deepseek-r1-qwen` do, but composes decomposed accents first, which llama.cpp does not.

    Raises:
        GgufImportError: the ids differ.
    """
    from transformers import AutoTokenizer

    found_whole = (vocabulary.tokens[i] for i in sorted(vocabulary.special | vocabulary.added))
    text = PROBE + " x1".join(found_whole)
    loaded = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    if loaded.encode(text) != backend.encode(text).ids:
        raise GgufImportError(
            f"AutoTokenizer loads the imported tokenizer (pre-tokenizer {vocabulary.pre}) as a "
            f"{type(loaded).__name__}, which gives other ids; use the model's original checkpoint as base"
        )
