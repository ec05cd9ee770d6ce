"""Tokenizers in the forms in which models come, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXTS = [
    "the lord said unto moses, speak unto the children of israel, saying, when any man hath a running issue",
    "return the number of items in the container; raises an exception where the container is empty",
    "o that this too too solid flesh would melt, thaw and resolve itself into a dew, naïve café over 1984",
]
#: Texts to encode: known and unknown characters, several spaces, special tokens among them.
PROBES = [
    *TEXTS,
    "a  b   c , d !",
    " leading and trailing ",
    "tabs\tand\nlines",
    "日本語 \U0001f600 Ω",
    "<s>the</s><|im_start|>user<|im_end|> x<extra>y",
]
MARKS = ["<|im_start|>", "<|im_end|>"]


def byte_level(size: int = 380, special: tuple[str, ...] = ("<s>", "</s>", *MARKS)) -> Any:
    """Byte-level BPE that puts ``<s>`` first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    if "<s>" in special:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def sentencepiece_model(path: Path, *, size: int = 400, kind: str = "bpe", **changes: Any) -> Path:
    """A ``tokenizer.model`` as Llama 2's: byte fallback, ``<unk>``, ``<s>``, ``</s>``."""
    import sentencepiece

    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "model_type": kind,
        "vocab_size": size,
        "byte_fallback": True,
        "character_coverage": 1.0,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "minloglevel": 2,
        **changes,
    }
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS * 20), model_writer=file, **settings)
    return path


def bpe_files(directory: Path, **made: Any) -> Path:
    """``vocab.json`` and ``merges.txt`` as GPT-2's, alone."""
    model = json.loads(byte_level(**{"special": ("<|endoftext|>",), **made}).to_str())["model"]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    lines = [" ".join(merge) for merge in model["merges"]]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n", encoding="utf-8")
    return directory


def behaviour(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer does, as plain data: the same of both generations of transformers."""
    ids = [list(tokenizer(text)["input_ids"]) for text in PROBES]
    return {
        "ids": ids,
        "bare": [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in PROBES],
        "decoded": [tokenizer.decode(row) for row in ids],
        "skipped": [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
        "size": len(tokenizer),
        "special": [getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad", "unk")],
        "chats": chats(tokenizer),
    }


def chats(tokenizer: Any) -> list[str]:
    """A conversation by the default template, and with tools; nothing without a template."""
    if not tokenizer.chat_template:
        return []
    turns = [{"role": "user", "content": "the lord"}, {"role": "assistant", "content": "said"}]
    tools = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}]
    return [tokenizer.apply_chat_template(turns, tokenize=False, **more) for more in ({}, {"tools": tools})]
