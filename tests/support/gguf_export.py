"""Tiny models with tokenizers that GGUF can express."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.families import family_model

from nemo_minitron.checkpoints.formats.gguf.architectures import WRITTEN

TEXTS = (
    "The quick brown fox jumps over the lazy dog, doesn't it? It's 12345 times 67.\n\n",
    "def add(a, b):\n    return a + b  # naïve über straße 日本語 \U0001f600\n",
    "She sells sea shells by the sea shore; they'll sell 90 of them in 2024.\n",
)
#: What no training text holds, too.
PROBES = (
    *TEXTS,
    "  x = [1, 2]\r\n\tI'LL ... !?",
    "Zebra\u00a0crossing №5 — ok",
    "",
    " ",
    "a" * 70,
    "<|im_end|> is a token",
)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: Rows of most matrices hold whole blocks; the vocabulary is larger than the tokenizer's.
SIZES: dict[str, Any] = {
    "vocab_size": 324,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
}

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0}
#: Name -> family and settings of a model that llama.cpp has.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {"norm_topk_prob": True} if family == "qwen3_moe" else {}) for family in WRITTEN},
    "llama3": ("llama", {"rope_scaling": LLAMA3, "tie_word_embeddings": True}),
    "linear": ("qwen3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "yarn": ("qwen2", {"rope_scaling": YARN}),
    "qwen2-usual": ("qwen2", {"head_dim": 16}),
    "gemma3-types": ("gemma3", {"sliding_window_pattern": 4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
}


def byte_level(path: Path, *, pre: str = "qwen2", size: int = 320, first: bool = False) -> Path:
    """A byte-level BPE that is trained on :data:`TEXTS`, with ChatML's markers and a template, saved into ``path``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from nemo_minitron.checkpoints.formats.gguf.splits import SPLITS, divide

    split = SPLITS[pre]
    raw = Tokenizer(models.BPE(ignore_merges=split.whole_words))
    divide(raw, split, prefix=False)
    special = ["<|endoftext|>", "<s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(list(TEXTS) * 20, trainer)
    raw.add_tokens([AddedToken("<tool>", normalized=False)])
    raw.decoder = decoders.ByteLevel()
    if first:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", raw.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def exportable(path: Path, family: str, *, tokenizer: Any = byte_level, **changes: Any) -> Path:
    """A tiny model of a family with a tokenizer, in one HF directory."""
    own = {"query_pre_attn_scalar": 32, "sliding_window": 12} if family == "gemma3" else {}
    if family == "nemotron":
        own = {"head_dim": 16}  # 4 x 16 = 64: llama.cpp wants the hidden size there
    family_model(family, path, **SIZES | {"eos_token_id": [3, 0]} | own | changes)
    return tokenizer(path)
