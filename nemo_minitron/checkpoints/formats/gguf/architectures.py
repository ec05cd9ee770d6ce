"""The architectures of GGUF files: what each header's keys and tensors are in transformers. An entry is data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    import torch

__all__ = ["ARCHITECTURES", "GGUFArchitecture", "minus_one", "turn_keys", "turn_queries"]

Undo = Callable[["torch.Tensor", ModelShape], "torch.Tensor"]
"""``(tensor as stored, sizes of the model) -> tensor as transformers has it``."""

#: Keys of a header below the architecture's name -> keys of ``config.json``.
KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
#: What llama.cpp takes where a header leaves it out.
DEFAULTS = {"rope_theta": 10000.0}


@dataclass(frozen=True)
class GGUFArchitecture:
    """One entry of :data:`ARCHITECTURES`.

    Attributes:
        title: transformers' class; the family that reads it reads these files.
        keys: keys of the header below the architecture's name -> keys of ``config.json``.
        constants: keys of ``config.json`` that no header has.
        derived: keys of ``config.json`` that llama.cpp computes from others: ``(config) -> keys and values``.
        undo: name of a tensor in the file, without ``blk.N.`` -> what undoes llama.cpp's change of it.
        neutral: keys of the header below the architecture's name -> the value at which they change nothing; another
            value is refused.
    """

    title: str
    keys: Mapping[str, str] = field(default_factory=lambda: KEYS)
    constants: Mapping[str, Any] = field(default_factory=dict)
    derived: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}
    undo: Mapping[str, Undo] = field(default_factory=dict)
    neutral: Mapping[str, Any] = field(default_factory=dict)


def turn_queries(tensor: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    """Undo llama.cpp's order of query rows: it turns neighbouring channels, transformers those half a head apart."""
    return _halves(tensor, shape.num_attention_heads)


def turn_keys(tensor: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    """As :func:`turn_queries`, for the rows of the keys."""
    return _halves(tensor, shape.num_query_groups)


def minus_one(tensor: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    """Undo the one that llama.cpp adds to the weights of norms that are stored minus one."""
    return tensor - 1


def _halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """``[heads * (head_dim / 2) * 2, ...]``, pairs together -> the first halves of all pairs, then the second."""
    return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _gemma3_scale(config: Mapping[str, Any]) -> dict[str, Any]:
    """The scale of attention scores, which no key has: the 27B model, known by its layers, has one of its own."""
    if config["num_hidden_layers"] == 62:
        return {"query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]}
    return {"query_pre_attn_scalar": config["head_dim"]}


_GEMMA3_NORMS = ("attn_norm", "attn_q_norm", "attn_k_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")

#: By the name in ``general.architecture``. Mistral's files are called "llama".
ARCHITECTURES: dict[str, GGUFArchitecture] = {
    "llama": GGUFArchitecture(
        "LlamaForCausalLM",
        undo={"attn_q.weight": turn_queries, "attn_k.weight": turn_keys},
        neutral={"expert_count": 0, "expert_used_count": 0, "logit_scale": 1.0},
    ),
    "qwen2": GGUFArchitecture("Qwen2ForCausalLM", constants={"use_sliding_window": False}),
    "qwen3": GGUFArchitecture("Qwen3ForCausalLM", constants={"use_sliding_window": False}),
    "nemotron": GGUFArchitecture(
        "NemotronForCausalLM",
        keys=KEYS | {"attention.layer_norm_epsilon": "norm_eps"},
        undo=dict.fromkeys(("attn_norm.weight", "ffn_norm.weight", "output_norm.weight"), minus_one),
    ),
    "gemma3": GGUFArchitecture(
        "Gemma3ForCausalLM",
        keys=KEYS
        | {
            "attention.sliding_window": "sliding_window",
            "attention.sliding_window_pattern": "sliding_window_pattern",
            "rope.freq_base_swa": "rope_local_base_freq",
        },
        constants={"sliding_window": None},  # llama.cpp would compute without windows: such a file is refused
        derived=_gemma3_scale,
        undo=dict.fromkeys((f"{name}.weight" for name in ("output_norm", *_GEMMA3_NORMS)), minus_one),
    ),
}
