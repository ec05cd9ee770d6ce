"""Rows of tables, tensor names and defaults that several families share."""

from __future__ import annotations

from typing import Any

from nemo_minitron.families.entry import Axis, Parameter

NORM = Parameter((Axis.HIDDEN,))
HEAD_NORM = Parameter((Axis.HEAD_DIM,))
EMBEDDING = Parameter((Axis.VOCAB, Axis.HIDDEN), tensor_parallel_dim=0)
FIRST = {"embedding.word_embeddings.weight": EMBEDDING}
LAST = {"decoder.final_layernorm.weight": NORM, "output_layer.weight": EMBEDDING}
ATTENTION = {
    "self_attention.linear_qkv.layer_norm_weight": NORM,
    "self_attention.linear_qkv.weight": Parameter((Axis.QKV, Axis.HIDDEN), tensor_parallel_dim=0),
    "self_attention.linear_proj.weight": Parameter((Axis.HIDDEN, Axis.HEADS), tensor_parallel_dim=1),
}
GATED = Parameter((Axis.GATED_FFN, Axis.HIDDEN), tensor_parallel_dim=0)
UP = Parameter((Axis.FFN, Axis.HIDDEN), tensor_parallel_dim=0)
DOWN = Parameter((Axis.HIDDEN, Axis.FFN), tensor_parallel_dim=1)
GATED_MLP = {
    "mlp.linear_fc1.layer_norm_weight": NORM,
    "mlp.linear_fc1.weight": GATED,
    "mlp.linear_fc2.weight": DOWN,
}

QK_NORMS = {"self_attention.q_layernorm.weight": HEAD_NORM, "self_attention.k_layernorm.weight": HEAD_NORM}
#: Instead of an MLP, with :data:`EXPERT`. The router reads the norm's output too, so Megatron does not fuse it into the
#: experts' first linear.
ROUTED = {"pre_mlp_layernorm.weight": NORM, "mlp.router.weight": Parameter((Axis.EXPERTS, Axis.HIDDEN))}
EXPERT = {"linear_fc1.weight": GATED, "linear_fc2.weight": DOWN}

HF_OUTER = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
HF_ATTENTION = {
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
}
HF_HEAD_NORMS = {
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
}
HF_FUSED_EXPERTS = {
    "linear_fc1.weight": "mlp.experts.gate_up_proj",
    "linear_fc2.weight": "mlp.experts.down_proj",
    "mlp.router.weight": "mlp.gate.weight",
}
HF_MLP_NORM = {"mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight",)}
HF_GATED_MLP = HF_MLP_NORM | {
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}

HF_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "num_key_value_heads": None,
    "sliding_window": None,
    "use_sliding_window": True,  # a key of Qwen's
    "partial_rotary_factor": 1.0,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
"""Of transformers' ``LlamaConfig``, and of what other classes have beside."""

QWEN_DEFAULTS = HF_DEFAULTS | {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
}
"""Of ``Qwen2Config``, all but ``head_dim`` of ``Qwen3Config``, and much of ``Qwen3MoeConfig``."""
