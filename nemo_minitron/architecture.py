"""The constants of a model, which pruning its width leaves alone; its sizes are :mod:`nemo_minitron.shape`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemo_minitron.shape import ModelShape

__all__ = ["FULL", "SLIDING", "Architecture", "period_of", "types_of"]

FULL, SLIDING = "full_attention", "sliding_attention"
"""Types of layers, by HF's names."""


def types_of(period: int, layers: int) -> tuple[str, ...]:
    """The types of layers where each ``period``-th one has full attention and the others slide."""
    return tuple(SLIDING if number % period else FULL for number in range(1, layers + 1))


def period_of(types: Sequence[str]) -> int | None:
    """The smallest period that gives these types (:func:`types_of`); None where none does."""
    return next((n for n in range(1, len(types) + 2) if types_of(n, len(types)) == tuple(types)), None)


@dataclass(frozen=True)
class Architecture:
    """The constants of a model. Pruning changes none of them but the list of ``layer_types`` (:meth:`of_layers`).

    Attributes:
        family: key of the axes table (:data:`nemo_minitron.families.FAMILIES`).
        norm_epsilon: epsilon of the normalisation layers.
        rotary_base: RoPE theta.
        rotary_percent: part of each head's channels that RoPE turns (HF's ``partial_rotary_factor``).
        rotary_scaling: HF's ``rope_scaling`` without keys that say nothing, or None. Its ``rope_type`` is one of
            "llama3", "linear" and "yarn"; of "yarn" the factor and the original context are always there, and their
            product is ``max_position_embeddings``.
        max_position_embeddings: longest sequence.
        bos_token_id, eos_token_id, pad_token_id: as in the HF config.
        dtype: dtype of the source weights ("float32", "bfloat16", ...).
        moe_router_topk: experts that each token is sent to; None where MLPs are dense.
        moe_router_pre_softmax: the weights of a token's experts are their shares in the softmax over all experts; else,
            over the chosen ones, so that they sum to 1 (HF's ``norm_topk_prob``).
        moe_aux_loss_coeff: weight of the load-balancing loss in training.
        layer_types: :data:`FULL` or :data:`SLIDING` for each layer; None where all layers have full attention, but in a
            family that has both types (:attr:`~nemo_minitron.families.entry.Family.layer_types`).
        sliding_window: tokens that a query of a sliding layer sees, its own included; None without such layers.
        rotary_base_local: RoPE theta of sliding layers, whose frequencies are never scaled; None: ``rotary_base`` and
            ``rotary_scaling`` are of all layers.
        query_pre_attn_scalar: attention scores are divided by its root; None for ``head_dim``.
        generation: settings of HF's ``generation_config.json`` beyond the token ids above (temperature, top_p, further
            end tokens ...); empty where there are none.
    """

    family: str = "llama"
    norm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rotary_scaling: dict[str, Any] | None = None
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    dtype: str = "float32"
    moe_router_topk: int | None = None
    moe_aux_loss_coeff: float = 0.0
    moe_router_pre_softmax: bool = False
    layer_types: tuple[str, ...] | None = None
    sliding_window: int | None = None
    rotary_base_local: float | None = None
    query_pre_attn_scalar: float | None = None
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.layer_types is not None:
            object.__setattr__(self, "layer_types", tuple(self.layer_types))  # JSON has lists

    @property
    def softmax_scale(self) -> float | None:
        """Factor of the attention scores; None for ``head_dim ** -0.5``."""
        return None if self.query_pre_attn_scalar is None else float(self.query_pre_attn_scalar) ** -0.5

    @property
    def windowed(self) -> bool:
        """Whether layers slide with the rotary embeddings that layers with full attention have, as Mistral's do."""
        return self.layer_types is not None and self.rotary_base_local is None

    def of_layers(self, layers: Sequence[int]) -> Architecture:
        """The constants of the model with only these layers: each keeps its type."""
        if self.layer_types is None:
            return self
        return dataclasses.replace(self, layer_types=tuple(self.layer_types[layer] for layer in layers))

    @property
    def end_tokens(self) -> list[int]:
        """The tokens that end an answer: those of the model's configuration and of its generation's; may be empty."""
        both = (self.eos_token_id, self.generation.get("eos_token_id"))
        return list(dict.fromkeys(token for ids in both for token in _as_list(ids)))

    @property
    def rotary_type(self) -> str:
        """The type of RoPE scaling; "default" for none."""
        if self.rotary_scaling is None:
            return "default"
        # records of earlier releases know one type, under either of transformers' names for the key
        return str(self.rotary_scaling.get("rope_type") or self.rotary_scaling.get("type") or "llama3")

    def faults(self, shape: ModelShape) -> list[str]:
        """Why a model of ``shape`` cannot have these constants; empty if it can."""
        experts, topk = shape.num_moe_experts, self.moe_router_topk
        if (experts is None) is not (topk is None):
            return [f"num_moe_experts={experts} with moe_router_topk={topk}: a mixture of experts needs both"]
        if experts is not None and topk is not None and topk > experts:
            return [f"num_moe_experts={experts}: each token goes to {topk} experts (moe_router_topk); keep as many"]
        if self.layer_types is not None and len(self.layer_types) != shape.num_layers:
            return [
                f"layer_types: {len(self.layer_types)} entries for num_layers={shape.num_layers}; each layer needs one"
            ]
        return []

    def context_faults(self, context: int) -> list[str]:
        """Why the sequences of this model cannot be split over so many context-parallel ranks; empty if they can."""
        if context == 1 or self.layer_types is None:
            return []
        return [
            f"parallel.context={context}: is not offered for this model of the family {self.family!r}, whose layers "
            "attend within sliding windows; set it to 1"
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        content = dataclasses.asdict(self)
        # Left out at their defaults: a record reads as it did before there were such settings.
        for name in ("generation", "moe_router_pre_softmax"):
            if not content[name]:
                del content[name]
        for name in ("layer_types", "sliding_window", "rotary_base_local", "query_pre_attn_scalar"):
            if content[name] is None:
                del content[name]
            elif name == "layer_types":
                content[name] = list(content[name])
        return content


def _as_list(ids: int | list[int] | None) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
