"""
What each name in `tokenizer.ggml.pre` means: how llama.cpp splits text before byte pairs are merged.

Read off llama.cpp (`src/llama-vocab.cpp` and `src/unicode.cpp`, commit 0c1e57098b), because transformers 5 knows
few of these names and splits text GPT-2's way for all others (SmolLM2's digits, for instance, are then no longer
taken one by one).
"""

from __future__ import annotations

from dataclasses import dataclass

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
