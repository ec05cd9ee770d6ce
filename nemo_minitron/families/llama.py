"""Llama, and Mistral, which is the same model but that its layers may attend within a sliding window."""

from __future__ import annotations

from nemo_minitron.families.entry import Family, HFFamily, NeMo2Family
from nemo_minitron.families.shared import (
    ATTENTION,
    FIRST,
    GATED_MLP,
    HF_ATTENTION,
    HF_DEFAULTS,
    HF_GATED_MLP,
    HF_OUTER,
    LAST,
)

__all__ = ["LLAMA"]

_MISTRAL_DEFAULTS = HF_DEFAULTS | {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}
#: Of NVIDIA's own class of Llama-Nemotron models; the sizes of its layers are in their blocks.
_DECILM_DEFAULTS = HF_DEFAULTS | {"intermediate_size": None}
_NO_BIAS = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}

LLAMA = Family(
    "llama",
    layer=ATTENTION | GATED_MLP,
    first=FIRST,
    last=LAST,
    hf=HFFamily(
        "LlamaForCausalLM",
        "llama",
        reads={
            "LlamaForCausalLM": HF_DEFAULTS,
            "MistralForCausalLM": _MISTRAL_DEFAULTS,
            "DeciLMForCausalLM": _DECILM_DEFAULTS,
        },
        needs=_NO_BIAS,
        writes=_NO_BIAS | {"pretraining_tp": 1},
        layer=HF_ATTENTION | HF_GATED_MLP,
        outer=HF_OUTER,
        by_layer=("DeciLMForCausalLM", "nemotron-nas"),
        windowed=("MistralForCausalLM", "mistral"),
    ),
    nemo2=NeMo2Family(
        "llama",
        "LlamaConfig",
        "LlamaModel",
        ("LlamaConfig", "Llama2Config", "Llama3", "CodeLlamaConfig", "MistralConfig", "GPTConfig"),
        scaled="Llama31Config",
        windowed=NeMo2Family("mistral", "MistralConfig7B", "MistralModel"),
    ),
    nemo1={"normalization": "rmsnorm", "qkv_bias": False, "activation": "fast-swiglu", "rotary_percentage": 1.0},
    note="(Mistral is one; it may have a sliding window in every layer)",
)
