"""Conversations, preference pairs and a tokenizer that knows every chat template, for tests of the alignment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.checkpoints import tiny_hf_model

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<extra_id_0>", "<extra_id_1>", "<extra_id_2>",
)  # fmt: skip


def chat_tokenizer(path: Path, *, special: tuple[str, ...] = SPECIAL) -> int:
    """A byte-level BPE tokenizer with some merges and without a template; returns its number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"how many apples are {n} and {n + 1}? there are {2 * n + 1} apples.\n" for n in range(40)]
    raw.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=special[0]).save_pretrained(path)
    return int(raw.get_vocab_size())


def chat_checkpoint(path: Path, *, vocab_size: int | None = None, **changes: Any) -> Path:
    """A tiny Llama with that tokenizer; by default an odd number of embedding rows, which two ranks cannot share."""
    tokens = chat_tokenizer(path)
    sizes = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "eos_token_id": 0}
    rows = vocab_size or tokens + 1 - tokens % 2
    return tiny_hf_model(path, **{"vocab_size": rows, "bos_token_id": None, "pad_token_id": None, **sizes, **changes})


def chats(count: int) -> list[dict[str, Any]]:
    """Conversations of one or two questions, some with a system message."""
    rows = []
    for n in range(count):
        messages = [
            {"role": "user", "content": f"how many apples are {n} and {n + 1}?"},
            {"role": "assistant", "content": f"there are {2 * n + 1} apples."},
        ]
        if n % 3 == 0:
            messages.insert(0, {"role": "system", "content": "count"})
        if n % 2:
            messages += [{"role": "user", "content": f"and {n}?"}, {"role": "assistant", "content": f"{n} apples"}]
        rows.append({"messages": messages})
    return rows


def preferences(count: int) -> list[dict[str, Any]]:
    """Pairs whose chosen answer counts and whose rejected one refuses; every other one has rewards."""
    rows: list[dict[str, Any]] = []
    for n in range(count):
        row: dict[str, Any] = {
            "prompt": f"how many apples are {n} and {n + 1}?",
            "chosen": f"there are {2 * n + 1} apples.",
            "rejected": "no" if n % 3 else f"who counts apples {n}?",
        }
        rows.append(row | ({"chosen_reward": 2.5, "rejected_reward": 0.5} if n % 2 else {}))
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """One object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
