"""Tiny random checkpoints for tests: well under a million parameters, built by transformers, no downloads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

TINY: dict[str, Any] = {
    "vocab_size": 131,  # odd: every NeMo format has to pad it
    "hidden_size": 48,
    "intermediate_size": 76,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,  # 6 x 12 = 72, not the hidden size
    "max_position_embeddings": 64,
    "rope_theta": 20000.0,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)


def tiny_hf_model(path: Path, *, tied: bool = False, dtype: str = "float32", seed: int = 0, **changes: Any) -> Path:
    """A random ``LlamaForCausalLM`` saved by transformers at ``path``; returns ``path``.

    Norm weights are random too: at their initial 1 a swapped pair would go unseen.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, "tie_word_embeddings": tied, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
            if parameter.ndim == 1:
                parameter.add_(1.0)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    return path


def tiny_tokenizer(path: Path, *, size: int = 131) -> Path:
    """A word-level HF tokenizer of exactly ``size`` tokens with a chat template, saved into ``path``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    words = special + [f"w{index}" for index in range(size - len(special))]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def tiny_checkpoint(path: Path, *, tied: bool = False, tokenizer: bool = True, **changes: Any) -> Path:
    """Model and tokenizer in one HF directory."""
    tiny_hf_model(path, tied=tied, **changes)
    if tokenizer:
        tiny_tokenizer(path, size=json.loads((path / "config.json").read_text())["vocab_size"])
    return path


def tokens(vocab_size: int = 131, *, rows: int = 2, length: int = 16, seed: int = 1) -> torch.Tensor:
    """``[rows, length]`` random token ids."""
    return torch.randint(0, vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def hf_logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """``[rows, length, vocab]`` float32 logits by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(ids).logits


def load_with_megatron(weights: Path, chunks: list[Any], *, prefix: str = "module.") -> None:
    """Fill this rank's model chunks by ``megatron.core.dist_checkpointing.load``, for any TP x PP.

    The reference against which :func:`nemo_minitron.checkpoints.load_into` and our writer are held: it asks for exactly
    what NeMo asks for, ``_extra_state`` included. Needs initialised process groups.

    Args:
        weights: the distributed checkpoint (``weights/`` of a NeMo 2 directory).
        chunks: plain ``GPTModel``s of this rank, without virtual pipeline stages.
        prefix: before every key, "module." for NeMo 2, "model." for ``.nemo``.
    """
    from megatron.core import dist_checkpointing

    for chunk in chunks:
        wanted = chunk.sharded_state_dict(prefix=prefix)
        loaded = dist_checkpointing.load(wanted, str(weights))
        chunk.load_state_dict({key.removeprefix(prefix): value for key, value in loaded.items() if key in wanted})
