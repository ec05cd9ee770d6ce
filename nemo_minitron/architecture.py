"""The constants of a model that pruning leaves alone; its sizes are :mod:`nemo_minitron.shape`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from nemo_minitron.shape import ModelShape

__all__ = ["Architecture"]


@dataclass(frozen=True)
class Architecture:
    """The constants of a model, which pruning does not change.

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
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)

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
        return []

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        content = dataclasses.asdict(self)
        for later in ("generation", "moe_router_pre_softmax"):  # records of earlier releases do not have them
            if not content[later]:
                del content[later]
        return content


def _as_list(ids: int | list[int] | None) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
