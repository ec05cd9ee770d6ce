"""A tokenizer made on the spot and some text for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

WORDS = [f"w{number}" for number in range(120)]


def write_tokenizer(directory: Path, *, eos: bool = True, chat: bool = False) -> Path:
    """A word-level fast tokenizer of 123 entries: ``<eos>`` 0, ``<unk>`` 1, ``<bos>`` 2, then :data:`WORDS`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<eos>", "<unk>", "<bos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<eos>" if eos else None,
    )
    if chat:
        wrapped.chat_template = "{% for m in messages %}<bos> {{ m['content'] }} {% endfor %}"
    directory.mkdir(parents=True, exist_ok=True)
    wrapped.save_pretrained(directory)
    return directory


def sentences(count: int, words: int, seed: int) -> list[str]:
    """``count`` random texts of ``words`` words each."""
    generator = np.random.default_rng(seed)
    return [" ".join(WORDS[i] for i in generator.integers(0, len(WORDS), words)) for _ in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """One ``{"text": ...}`` a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path
