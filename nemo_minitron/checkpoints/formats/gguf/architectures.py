"""The architectures of GGUF files: what each header's keys and tensors are in transformers. An entry is data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nemo_minitron.architecture import FULL, SLIDING
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    import torch

__all__ = [
    "ARCHITECTURES",
    "DEFAULTS",
    "EXPERTS",
    "WRITTEN",
    "Change",
    "GGUFArchitecture",
    "architecture_of",
    "written_as",
]

Turn = Callable[["torch.Tensor", ModelShape], "torch.Tensor"]
"""``(tensor, sizes of the model) -> tensor``."""


@dataclass(frozen=True)
class Change:
    """What llama.cpp's converter does to a tensor, and what undoes it.

    Attributes:
        make: a tensor as transformers has it -> as the file has it.
        undo: the other way round.
    """

    make: Turn
    undo: Turn


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
        by_layer: keys of the header below the architecture's name that may differ between layers -> what their lists
            are in ``config.json``: ``(list) -> keys and values``.
        changes: name of a tensor in the file, without ``blk.N.`` -> llama.cpp's change of it.
        mixture: the entry of files whose header has experts; None where there are none.
        biased: the entry of files whose queries, keys and values have biases; None where there are none.
        neutral: keys of the header below the architecture's name -> the value at which they change nothing; another
            value is refused.
    """

    title: str
    keys: Mapping[str, str] = field(default_factory=lambda: KEYS)
    constants: Mapping[str, Any] = field(default_factory=dict)
    derived: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}
    by_layer: Mapping[str, Callable[[list[Any]], dict[str, Any]]] = field(default_factory=dict)
    changes: Mapping[str, Change] = field(default_factory=dict)
    mixture: GGUFArchitecture | None = None
    biased: GGUFArchitecture | None = None
    neutral: Mapping[str, Any] = field(default_factory=dict)


def _halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """``[heads * (head_dim / 2) * 2, ...]``, pairs together -> the first halves of all pairs, then the second."""
    return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _pairs(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of :func:`_halves`."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


#: llama.cpp turns neighbouring channels, transformers those half a head apart.
_QUERIES = Change(
    make=lambda tensor, shape: _pairs(tensor, shape.num_attention_heads),
    undo=lambda tensor, shape: _halves(tensor, shape.num_attention_heads),
)
_KEYS = Change(
    make=lambda tensor, shape: _pairs(tensor, shape.num_query_groups),
    undo=lambda tensor, shape: _halves(tensor, shape.num_query_groups),
)
#: Weights of norms that are stored minus one.
_PLUS_ONE = Change(make=lambda tensor, shape: tensor + 1, undo=lambda tensor, shape: tensor - 1)
_PAIRED = {"attn_q.weight": _QUERIES, "attn_k.weight": _KEYS}
_PAIRED_BIASES = {"attn_q.bias": _QUERIES, "attn_k.bias": _KEYS}


def _gemma3_scale(config: Mapping[str, Any]) -> dict[str, Any]:
    """The scale of attention scores, which no key has: the 27B model, known by its layers, has one of its own."""
    if config["num_hidden_layers"] == 62:
        return {"query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]}
    return {"query_pre_attn_scalar": config["head_dim"]}


def _gemma3_types(slides: list[Any]) -> dict[str, Any]:
    """The types of layers, of a list that says which slide."""
    return {"layer_types": [SLIDING if one else FULL for one in slides]}


_EXPERT_KEYS = {"expert_used_count": "num_experts_per_tok"}
_ROUTED = {"expert_gating_func": 1, "expert_weights_norm": True, "expert_weights_scale": 1.0}
_GEMMA3_NORMS = ("attn_norm", "attn_q_norm", "attn_k_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")

#: By the name in ``general.architecture``. Mistral's and Mixtral's files are called "llama".
ARCHITECTURES: dict[str, GGUFArchitecture] = {
    "llama": GGUFArchitecture(
        "LlamaForCausalLM",
        changes=_PAIRED,
        neutral={"expert_count": 0, "expert_used_count": 0, "logit_scale": 1.0},
        mixture=GGUFArchitecture(
            "MixtralForCausalLM",
            keys=KEYS | _EXPERT_KEYS | {"expert_count": "num_local_experts"},
            changes=_PAIRED,
            neutral=_ROUTED | {"logit_scale": 1.0},
        ),
        biased=GGUFArchitecture(
            "Qwen2ForCausalLM", constants={"use_sliding_window": False}, changes=_PAIRED | _PAIRED_BIASES
        ),
    ),
    "qwen2": GGUFArchitecture("Qwen2ForCausalLM", constants={"use_sliding_window": False}),
    "qwen3": GGUFArchitecture("Qwen3ForCausalLM", constants={"use_sliding_window": False}),
    "qwen3moe": GGUFArchitecture(
        "Qwen3MoeForCausalLM",
        keys=KEYS
        | _EXPERT_KEYS
        | {"expert_count": "num_experts", "expert_feed_forward_length": "moe_intermediate_size"},
        constants={"use_sliding_window": False, "norm_topk_prob": True},
        neutral=_ROUTED,
    ),
    "nemotron": GGUFArchitecture(
        "NemotronForCausalLM",
        keys=KEYS | {"attention.layer_norm_epsilon": "norm_eps"},
        changes=dict.fromkeys(("attn_norm.weight", "ffn_norm.weight", "output_norm.weight"), _PLUS_ONE),
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
        by_layer={"attention.sliding_window_pattern": _gemma3_types},
        changes=dict.fromkeys((f"{name}.weight" for name in ("output_norm", *_GEMMA3_NORMS)), _PLUS_ONE),
    ),
}

#: Family -> the architecture that its models are written as, but for :func:`written_as`.
WRITTEN = {
    "llama": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "nemotron": "nemotron",
    "gemma3": "gemma3",
}

#: Canonical name of a tensor of one expert, below its number -> tensors of the file, each with all experts of a layer:
#: ``[E, ...]``.
EXPERTS: dict[str, tuple[str, ...]] = {
    "linear_fc1.weight": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "linear_fc2.weight": ("ffn_down_exps.weight",),
}


def written_as(family: str, shape: ModelShape) -> str | None:
    """The architecture that a model is written as; None for a family that llama.cpp does not have.

    llama.cpp wants the heads of "qwen2" as wide as the hidden states. After pruning they are not, and such a model is
    written as "llama", which has room for its biases and computes the same.
    """
    name = WRITTEN.get(family)
    if name == "qwen2" and shape.num_attention_heads * shape.head_dim != shape.hidden_size:
        return "llama"
    return name


def architecture_of(name: str, *, experts: bool, biases: bool = False) -> GGUFArchitecture | None:
    """The entry of a name; of files with experts, or with biases, its own for them. None for one that is not known."""
    entry = ARCHITECTURES.get(name)
    other = None if entry is None else entry.mixture if experts else entry.biased if biases else None
    return other or entry
