"""Gemma 3 (text): norms before and after each part, sliding windows in most layers, scaled embeddings, tanh-GELU."""

from __future__ import annotations

from nemo_minitron.families.entry import Family, HFFamily, NeMo2Family
from nemo_minitron.families.shared import (
    ATTENTION,
    FIRST,
    GATED_MLP,
    HEAD_NORM,
    HF_ATTENTION,
    HF_DEFAULTS,
    HF_GATED_MLP,
    HF_OUTER,
    LAST,
    NORM,
)

__all__ = ["GEMMA3"]

_DEFAULTS = HF_DEFAULTS | {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "rope_local_base_freq": 10000.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_NEEDS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
}

GEMMA3 = Family(
    "gemma3",
    layer=ATTENTION
    | {
        "self_attention.q_layernorm.weight": HEAD_NORM,
        "self_attention.k_layernorm.weight": HEAD_NORM,
        # NeMo's names: the norm of a part's output is a module of its last linear (TERowParallelLinearLayerNorm)
        "self_attention.linear_proj.post_layernorm.weight": NORM,
    }
    | GATED_MLP
    | {"mlp.linear_fc2.post_layernorm.weight": NORM},
    first=FIRST,
    last=LAST,
    activation="gelu_tanh",
    zero_centered_norm=True,
    scaled_embedding=True,
    layer_types=True,
    hf=HFFamily(
        "Gemma3ForCausalLM",
        "gemma3_text",
        reads={"Gemma3ForCausalLM": _DEFAULTS},
        needs=_NEEDS,
        writes=_NEEDS,
        layer=HF_ATTENTION
        | {
            "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
            "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
            "self_attention.linear_proj.post_layernorm.weight": ("post_attention_layernorm.weight",),
        }
        | HF_GATED_MLP
        | {
            "mlp.linear_fc1.layer_norm_weight": ("pre_feedforward_layernorm.weight",),
            "mlp.linear_fc2.post_layernorm.weight": ("post_feedforward_layernorm.weight",),
        },
        outer=HF_OUTER,
    ),
    # NeMo's Gemma3Config itself lacks a field that it reads (rope_scaling_factor); its classes of a size have it
    nemo2=NeMo2Family("gemma3", "Gemma3Config1B", "Gemma3Model", ("Gemma3Config",)),
    nemo1=None,  # it has neither norms after a part nor layers of two types
    note="norms after attention and MLP too, QK norms, weights of norms stored minus one, sliding windows with a "
    "rotary base of their own in most layers, scaled embeddings, a tanh-GELU gate",
)
