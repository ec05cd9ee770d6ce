"""Qwen3: Llama with an RMSNorm of each head's queries and keys."""

from __future__ import annotations

from nemo_minitron.families.entry import Family, HFFamily, NeMo2Family
from nemo_minitron.families.shared import (
    ATTENTION,
    FIRST,
    GATED_MLP,
    HF_ATTENTION,
    HF_GATED_MLP,
    HF_HEAD_NORMS,
    HF_OUTER,
    LAST,
    QK_NORMS,
    QWEN_DEFAULTS,
)

__all__ = ["QWEN3"]

QWEN3 = Family(
    "qwen3",
    layer=ATTENTION | QK_NORMS | GATED_MLP,
    first=FIRST,
    last=LAST,
    hf=HFFamily(
        "Qwen3ForCausalLM",
        "qwen3",
        reads={"Qwen3ForCausalLM": QWEN_DEFAULTS | {"head_dim": 128}},
        needs={"hidden_act": "silu", "attention_bias": False},
        writes={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
        layer=HF_ATTENTION | HF_HEAD_NORMS | HF_GATED_MLP,
        outer=HF_OUTER,
    ),
    nemo2=NeMo2Family("qwen3", "Qwen3Config", "Qwen3Model", ("Qwen3Config", "GPTConfig")),
    nemo1=None,  # it builds its layers without QK norms (``megatron_gpt_model.get_specs``)
    note="RMSNorm of each head's queries and keys",
)
