"""Qwen2 and Qwen2.5: Llama with a bias of queries, keys and values."""

from __future__ import annotations

from nemo_minitron.families.entry import Axis, Family, HFFamily, NeMo2Family, Parameter
from nemo_minitron.families.shared import (
    ATTENTION,
    FIRST,
    GATED_MLP,
    HF_ATTENTION,
    HF_GATED_MLP,
    HF_OUTER,
    LAST,
    QWEN_DEFAULTS,
)

__all__ = ["QWEN2"]

_HF_BIAS = ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")

QWEN2 = Family(
    "qwen2",
    layer=ATTENTION | {"self_attention.linear_qkv.bias": Parameter((Axis.QKV,), tensor_parallel_dim=0)} | GATED_MLP,
    first=FIRST,
    last=LAST,
    hf=HFFamily(
        "Qwen2ForCausalLM",
        "qwen2",
        reads={"Qwen2ForCausalLM": QWEN_DEFAULTS},
        needs={"hidden_act": "silu"},
        writes={"hidden_act": "silu", "use_sliding_window": False},
        layer=HF_ATTENTION | {"self_attention.linear_qkv.bias": _HF_BIAS} | HF_GATED_MLP,
        outer=HF_OUTER,
    ),
    nemo2=NeMo2Family("qwen2", "Qwen2Config", "Qwen2Model", ("Qwen2Config", "Qwen25Config", "GPTConfig")),
    nemo1={"normalization": "rmsnorm", "qkv_bias": True, "activation": "fast-swiglu", "rotary_percentage": 1.0},
    note="bias of queries, keys and values",
)
