"""What a model is: its sizes (:class:`ModelShape`) and the constants that pruning leaves alone (:class:`Architecture`).

Names are Megatron's. Nothing here imports torch, so that plans and configuration errors answer at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from nemo_minitron.errors import ShapeError

__all__ = ["SIZES", "Architecture", "ModelShape", "padded_vocab"]

#: The sizes of a :class:`ModelShape` that pruning may change, without the vocabulary's. Megatron's configuration has
#: them under the same names.
SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "num_moe_experts",
)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a GPT-style decoder. All are global: no parallel layout changes them.

    Attributes:
        num_layers: decoder layers.
        hidden_size: width of the residual stream.
        ffn_hidden_size: width of the MLP (of each half, where the MLP is gated).
        num_attention_heads: query heads.
        num_query_groups: key/value heads.
        head_dim: channels of one head (Megatron's ``kv_channels``). Explicit, because a pruned model
            rarely satisfies ``heads * head_dim == hidden``.
        vocab_size: true vocabulary, without the padding rows that Megatron adds.
        tied_embeddings: the output layer shares the word embedding.
        num_moe_experts: experts of each MLP, or None where it is dense. With experts, ``ffn_hidden_size`` is the width
            of one.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool = False
    num_moe_experts: int | None = None

    def __post_init__(self) -> None:
        if faults := self.faults():
            raise ShapeError(faults)

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_query_groups

    def faults(self) -> list[str]:
        """Everything that makes these sizes impossible, as one-line messages."""
        found = [
            f"{name}={value}: must be a whole number of at least 1"
            for name, value in dataclasses.asdict(self).items()
            if name != "tied_embeddings"
            and not (name == "num_moe_experts" and value is None)
            and (not isinstance(value, int) or isinstance(value, bool) or value < 1)
        ]
        if not found and self.num_attention_heads % self.num_query_groups:
            found.append(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_query_groups={self.num_query_groups}: every group needs the same number of heads"
            )
        return found

    def layout_faults(self, *, tensor: int, pipeline: int = 1) -> list[str]:
        """Why this shape cannot be split ``tensor`` ways by columns and ``pipeline`` ways by layers; empty if it can.

        Each message names the sizes that would fit.
        """
        found = []
        for name in ("num_query_groups", "num_attention_heads", "ffn_hidden_size"):
            size = getattr(self, name)
            if size % tensor:
                fits = [t for t in range(1, min(size, 64) + 1) if size % t == 0]
                found.append(
                    f"{name}={size} cannot be split over parallel.tensor={tensor}; it fits parallel.tensor in {fits}"
                )
        if pipeline > self.num_layers:
            found.append(
                f"num_layers={self.num_layers} cannot fill {pipeline} stages (parallel.pipeline, times "
                f"virtual_pipeline); use at most {self.num_layers}"
            )
        return found

    def stage_sizes(self, stages: int) -> list[int]:
        """Layers of each pipeline stage, in order: as equal as can be, the first ones getting one more.

        Args:
            stages: pipeline stages, times the model chunks of each under a virtual pipeline.

        Raises:
            ShapeError: if there are more stages than layers.
        """
        if faults := self.layout_faults(tensor=1, pipeline=stages):
            raise ShapeError(faults)
        each, more = divmod(self.num_layers, stages)
        return [each + (stage < more) for stage in range(stages)]

    def prune_faults(self, target: ModelShape) -> list[str]:
        """Why ``target`` cannot be reached from this shape by removing units; empty if it can."""
        found = []
        for field in dataclasses.fields(self):
            ours, theirs = getattr(self, field.name), getattr(target, field.name)
            if field.name in ("head_dim", "tied_embeddings") or None in (ours, theirs):
                if ours != theirs:
                    found.append(f"{field.name}: pruning keeps it at {ours}, the target asks for {theirs}")
            elif theirs > ours:
                found.append(f"{field.name}={theirs}: the model has only {ours}")
        if not found and target.heads_per_group > self.heads_per_group:
            found.append(
                f"num_attention_heads={target.num_attention_heads} in num_query_groups={target.num_query_groups} "
                f"needs {target.heads_per_group} heads a group; the model's groups have {self.heads_per_group}"
            )
        return found

    def replace(self, **changes: Any) -> ModelShape:
        """A copy with some sizes changed.

        Raises:
            ShapeError: if the result is impossible.
        """
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Architecture:
    """The constants of a model that no pruning touches.

    Attributes:
        family: key of the axes table (:data:`nemo_minitron.families.FAMILIES`).
        norm_epsilon: epsilon of the normalisation layers.
        rotary_base: RoPE theta.
        rotary_percent: part of each head's channels that RoPE turns (HF's ``partial_rotary_factor``).
        rotary_scaling: HF's ``rope_scaling`` (Llama-3 style) or None.
        max_position_embeddings: longest sequence.
        bos_token_id, eos_token_id, pad_token_id: as in the HF config.
        dtype: dtype of the source weights ("float32", "bfloat16", ...).
        moe_router_topk: experts that each token is sent to; None where MLPs are dense.
        moe_aux_loss_coeff: weight of the load-balancing loss in training.
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

    @property
    def end_tokens(self) -> list[int]:
        """``eos_token_id`` as a list, empty for none."""
        ids = self.eos_token_id
        return ids if isinstance(ids, list) else [] if ids is None else [ids]

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
        return dataclasses.asdict(self)


def padded_vocab(vocab_size: int, *, tensor: int, multiple: int = 128) -> int:
    """Vocabulary rows of a model split ``tensor`` ways: the next multiple of ``multiple * tensor``.

    As ``nemo.collections.llm.gpt.model.base.get_vocab_size`` and Megatron's ``vocab_size_with_padding``.
    """
    step = multiple * tensor
    return -(-vocab_size // step) * step
