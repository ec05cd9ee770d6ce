"""Qwen3-MoE (Qwen3-30B-A3B ...): Qwen3 whose MLP is a mixture of experts, as Mixtral's is."""

from __future__ import annotations

from nemo_minitron.families.entry import Family, HFFamily, NeMo2Family
from nemo_minitron.families.shared import (
    ATTENTION,
    EXPERT,
    FIRST,
    HF_ATTENTION,
    HF_FUSED_EXPERTS,
    HF_HEAD_NORMS,
    HF_OUTER,
    LAST,
    QK_NORMS,
    QWEN_DEFAULTS,
    ROUTED,
)

__all__ = ["QWEN3_MOE"]

_EVERY_LAYER = {"decoder_sparse_step": 1, "mlp_only_layers": []}

QWEN3_MOE = Family(
    "qwen3_moe",
    layer=ATTENTION | QK_NORMS | ROUTED,
    first=FIRST,
    last=LAST,
    expert=EXPERT,
    hf=HFFamily(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        reads={
            "Qwen3MoeForCausalLM": QWEN_DEFAULTS
            | {
                "num_key_value_heads": 4,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
                "norm_topk_prob": False,
                "router_aux_loss_coef": 0.001,
                **_EVERY_LAYER,
            }
        },
        needs={"hidden_act": "silu", "attention_bias": False, **_EVERY_LAYER},
        writes={
            "hidden_act": "silu",
            "attention_bias": False,
            "output_router_logits": False,
            "use_sliding_window": False,
            **_EVERY_LAYER,
        },
        layer=HF_ATTENTION
        | HF_HEAD_NORMS
        | {
            "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
            "mlp.router.weight": ("mlp.gate.weight",),
        },
        expert={
            "linear_fc1.weight": ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
            "linear_fc2.weight": ("mlp.experts.{}.down_proj.weight",),
        },
        outer=HF_OUTER,
        fused=HF_FUSED_EXPERTS,
        width="moe_intermediate_size",
        experts="num_experts",
        normalized="norm_topk_prob",
        other_names={"num_local_experts": "num_experts"},
        unused={"intermediate_size": "the width of layers without experts, of which there are none"},
    ),
    nemo2=NeMo2Family(
        "qwen3",
        "Qwen3MoEConfig",
        "Qwen3Model",
        ("Qwen3MoEConfig", "Qwen3Config30B", "Qwen3Config235B", "GPTConfig"),
    ),
    nemo1=None,  # as of Qwen3 and of Mixtral
    note="Qwen3 with a mixture of experts, whose weights need not be normalised",
)
