"""Mixtral: Llama whose MLP is a mixture of experts with a softmax router."""

from __future__ import annotations

from nemo_minitron.families.entry import Family, HFFamily, NeMo2Family
from nemo_minitron.families.shared import (
    ATTENTION,
    EXPERT,
    FIRST,
    HF_ATTENTION,
    HF_DEFAULTS,
    HF_FUSED_EXPERTS,
    HF_OUTER,
    LAST,
    ROUTED,
)

__all__ = ["MIXTRAL"]

MIXTRAL = Family(
    "mixtral",
    layer=ATTENTION | ROUTED,
    first=FIRST,
    last=LAST,
    expert=EXPERT,
    hf=HFFamily(
        "MixtralForCausalLM",
        "mixtral",
        reads={
            "MixtralForCausalLM": HF_DEFAULTS
            | {
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1e6,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "router_aux_loss_coef": 0.001,
                "router_jitter_noise": 0.0,
            }
        },
        needs={"hidden_act": "silu", "router_jitter_noise": 0.0},
        writes={"hidden_act": "silu", "output_router_logits": False, "router_jitter_noise": 0.0},
        layer=HF_ATTENTION
        | {
            "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
            "mlp.router.weight": ("block_sparse_moe.gate.weight",),
        },
        expert={
            "linear_fc1.weight": ("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"),
            "linear_fc2.weight": ("block_sparse_moe.experts.{}.w2.weight",),
        },
        outer=HF_OUTER,
        fused=HF_FUSED_EXPERTS,
    ),
    nemo2=NeMo2Family("mixtral", "MixtralConfig", "MixtralModel", ("MixtralConfig", "GPTConfig")),
    nemo1=None,  # it gives the experts of a mixture no width (``megatron_gpt_model.build_transformer_config``)
    note="a mixture of experts with a softmax router",
)
