"""Nemotron and Minitron: LayerNorm with bias, squared ReLU without a gate, RoPE on a part of each head."""

from __future__ import annotations

from nemo_minitron.families.entry import Family, HFFamily, NeMo2Family
from nemo_minitron.families.shared import (
    ATTENTION,
    DOWN,
    FIRST,
    HF_ATTENTION,
    HF_DEFAULTS,
    HF_MLP_NORM,
    HF_OUTER,
    LAST,
    NORM,
    UP,
)

__all__ = ["NEMOTRON"]

NEMOTRON = Family(
    "nemotron",
    layer=ATTENTION
    | {
        "self_attention.linear_qkv.layer_norm_bias": NORM,
        "mlp.linear_fc1.layer_norm_weight": NORM,
        "mlp.linear_fc1.layer_norm_bias": NORM,
        "mlp.linear_fc1.weight": UP,
        "mlp.linear_fc2.weight": DOWN,
    },
    first=FIRST,
    last=LAST | {"decoder.final_layernorm.bias": NORM},
    activation="squared_relu",
    normalization="LayerNorm",
    zero_centered_norm=True,
    partial_rotary=True,
    hf=HFFamily(
        "NemotronForCausalLM",
        "nemotron",
        reads={
            "NemotronForCausalLM": HF_DEFAULTS
            | {
                "max_position_embeddings": 4096,
                "hidden_act": "relu2",
                "norm_eps": 1e-5,
                "partial_rotary_factor": 0.5,
                "bos_token_id": 2,
                "eos_token_id": 3,
            }
        },
        needs={"hidden_act": "relu2", "attention_bias": False, "mlp_bias": False, "rope_scaling": None},
        writes={"hidden_act": "relu2", "attention_bias": False, "mlp_bias": False},
        layer=HF_ATTENTION
        | {"self_attention.linear_qkv.layer_norm_bias": ("input_layernorm.bias",)}
        | HF_MLP_NORM
        | {
            "mlp.linear_fc1.layer_norm_bias": ("post_attention_layernorm.bias",),
            "mlp.linear_fc1.weight": ("mlp.up_proj.weight",),
            "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
        },
        outer=HF_OUTER | {"decoder.final_layernorm.bias": "model.norm.bias"},
        epsilon="norm_eps",
    ),
    nemo2=NeMo2Family("nemotron", "NemotronConfig", "NemotronModel", ("Nemotron", "GPTConfig"), rotary_percent=0.5),
    nemo1={"normalization": "layernorm1p", "qkv_bias": False, "activation": "squared-relu"},
    note="LayerNorm with bias and weights stored minus one, squared ReLU without a gate, RoPE on a part of each head",
)
