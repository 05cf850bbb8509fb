"""A tiny Llama with a real kind of tokenizer, made in a second: 1.7 M weights, 256 wide, SentencePiece."""

from __future__ import annotations

import json
from pathlib import Path

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "tie_word_embeddings": False,
}
TRAIN = {
    "data": "train.jsonl",
    "method": "qlora",
    "device": "cpu",
    "threads": 2,
    "precision": "fp32",
    "num_train_epochs": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.01,
    "lora": {"r": 4, "lora_alpha": 8},
}
CONVERSATIONS = [
    ("What builds the model?", "Snakemake builds it."),
    ("モデルは何で作りますか？", "Snakemake です。"),
    ("Which type is the default?", "q4_k_m"),
    ("既定の量子化は？", "q4_k_m です。"),
    ("How many GPUs?", "Two of 24 GB."),
    ("How is the merge done?", "In float32, rounded once."),
]


def write_tiny_base(folder: Path, *, seed: int = 0) -> Path:
    """Write a sharded random Llama checkpoint with its tokenizer into `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(**SHAPE, max_position_embeddings=512, bos_token_id=1, eos_token_id=3, pad_token_id=0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="2MB")
    _write_tokenizer(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    import sentencepiece
    from transformers import LlamaTokenizer

    text = folder / "corpus.txt"
    text.write_text("\n".join(part for pair in CONVERSATIONS for part in pair) + "\n", encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=SHAPE["vocab_size"],
        byte_fallback=True,
        pad_id=0,
        bos_id=1,
        unk_id=2,
        eos_id=-1,
        control_symbols=["<|im_end|>", "<|im_start|>"],
        hard_vocab_limit=True,
        minloglevel=2,
    )
    text.unlink()
    (folder / "tokenizer.vocab").unlink()
    tokenizer = LlamaTokenizer.from_pretrained(
        folder, eos_token="<|im_end|>", pad_token="<pad>", add_prefix_space=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def write_text(path: Path, *, repeats: int = 20) -> Path:
    """Write text for an importance matrix: with the tiny tokenizer, which knows few words, some 200 tokens a repeat."""
    text = "\n".join(f"{question} {answer}" for question, answer in CONVERSATIONS)
    path.write_text("".join(f"{number}. {text}\n" for number in range(repeats)), encoding="utf-8")
    return path


def write_data(path: Path, *, repeats: int = 1) -> Path:
    """Write the conversations as training data."""
    lines = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in CONVERSATIONS * repeats
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path
