"""What transformers calls things in each model family: architectures, configuration keys, tensor names.

With the family's axes table (:mod:`nemo_minitron.axes`) this is all that the Hugging Face door knows of a family. How
the parts of a canonical tensor are put together follows from its axes
(:mod:`nemo_minitron.checkpoints.formats.huggingface.names`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_minitron.errors import CheckpointError

__all__ = ["HF_FAMILIES", "HFFamily", "hf_family"]


@dataclass(frozen=True)
class HFFamily:
    """A family in transformers.

    Attributes:
        architecture: class that is written.
        model_type: transformers' key of it.
        reads: classes that are read, with what their configuration takes for keys that a ``config.json`` leaves out.
        needs: keys and the values that the axes table stands for; another value is refused.
        writes: keys and values that are written beside the sizes and constants.
        layer: canonical name below ``decoder.layers.N.`` -> names below ``model.layers.N.``.
        expert: canonical name below ``...local_experts.E.`` -> names below ``model.layers.N.``, with ``{}`` for ``E``.
        outer: canonical name -> name, outside the layers.
        by_layer: class and type of models whose layers have sizes of their own (``block_configs``), one of ``reads``;
            None where transformers' users know none.
        epsilon: key of the norms' epsilon.
        partial_rotary: RoPE may turn a part of each head (``partial_rotary_factor``).
    """

    architecture: str
    model_type: str
    reads: Mapping[str, Mapping[str, Any]]
    needs: Mapping[str, Any]
    writes: Mapping[str, Any]
    layer: Mapping[str, tuple[str, ...]]
    outer: Mapping[str, str]
    expert: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    by_layer: tuple[str, str] | None = None
    epsilon: str = "rms_norm_eps"
    partial_rotary: bool = False


_OUTER = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_ATTENTION = {
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
}
_MLP_NORM = {"mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight",)}
_GATED_MLP = _MLP_NORM | {
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}
_QKV_BIAS = {
    "self_attention.linear_qkv.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
}
_QK_NORM = {
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
}

_LLAMA_DEFAULTS: dict[str, Any] = {
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
_MISTRAL_DEFAULTS = _LLAMA_DEFAULTS | {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}
_QWEN2_DEFAULTS = _LLAMA_DEFAULTS | {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
}
#: Of NVIDIA's own class of Llama-Nemotron models; the sizes of its layers are in their blocks.
_DECILM_DEFAULTS = _LLAMA_DEFAULTS | {"intermediate_size": None}
_NO_BIAS = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}

HF_FAMILIES: dict[str, HFFamily] = {
    "llama": HFFamily(
        # without sliding windows a Mistral model computes exactly what a Llama model does
        "LlamaForCausalLM",
        "llama",
        reads={
            "LlamaForCausalLM": _LLAMA_DEFAULTS,
            "MistralForCausalLM": _MISTRAL_DEFAULTS,
            "DeciLMForCausalLM": _DECILM_DEFAULTS,
        },
        needs=_NO_BIAS,
        writes=_NO_BIAS | {"pretraining_tp": 1},
        by_layer=("DeciLMForCausalLM", "nemotron-nas"),
        layer=_ATTENTION | _GATED_MLP,
        outer=_OUTER,
    ),
    "qwen2": HFFamily(
        "Qwen2ForCausalLM",
        "qwen2",
        reads={"Qwen2ForCausalLM": _QWEN2_DEFAULTS},
        needs={"hidden_act": "silu"},
        writes={"hidden_act": "silu", "use_sliding_window": False},
        layer=_ATTENTION | _QKV_BIAS | _GATED_MLP,
        outer=_OUTER,
    ),
    "qwen3": HFFamily(
        "Qwen3ForCausalLM",
        "qwen3",
        reads={"Qwen3ForCausalLM": _QWEN2_DEFAULTS | {"head_dim": 128}},
        needs={"hidden_act": "silu", "attention_bias": False},
        writes={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
        layer=_ATTENTION | _QK_NORM | _GATED_MLP,
        outer=_OUTER,
    ),
    "nemotron": HFFamily(
        "NemotronForCausalLM",
        "nemotron",
        reads={
            "NemotronForCausalLM": _LLAMA_DEFAULTS
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
        layer=_ATTENTION
        | {"self_attention.linear_qkv.layer_norm_bias": ("input_layernorm.bias",)}
        | _MLP_NORM
        | {
            "mlp.linear_fc1.layer_norm_bias": ("post_attention_layernorm.bias",),
            "mlp.linear_fc1.weight": ("mlp.up_proj.weight",),
            "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
        },
        outer=_OUTER | {"decoder.final_layernorm.bias": "model.norm.bias"},
        epsilon="norm_eps",
        partial_rotary=True,
    ),
    "mixtral": HFFamily(
        "MixtralForCausalLM",
        "mixtral",
        reads={
            "MixtralForCausalLM": _LLAMA_DEFAULTS
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
        layer=_ATTENTION
        | {
            "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
            "mlp.router.weight": ("block_sparse_moe.gate.weight",),
        },
        expert={
            "linear_fc1.weight": ("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"),
            "linear_fc2.weight": ("block_sparse_moe.experts.{}.w2.weight",),
        },
        outer=_OUTER,
    ),
}
"""By the key of :data:`nemo_minitron.axes.FAMILIES`. Defaults are those of transformers' configuration classes."""


def hf_family(name: str) -> HFFamily:
    """What transformers calls the things of a family.

    Raises:
        CheckpointError: if transformers does not know the family.
    """
    if name not in HF_FAMILIES:
        raise CheckpointError(
            f"family {name!r} has no Hugging Face form; write another format, or add it to HF_FAMILIES "
            f"(there: {', '.join(HF_FAMILIES)})"
        )
    return HF_FAMILIES[name]
