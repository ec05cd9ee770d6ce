"""How many bytes the fullest rank of a layout needs, before anything is built.

For one rank with tensor parallel ``t``, ``b`` sequences of ``s`` tokens in a micro-batch, and sizes named as in the
axes table (``H`` hidden, ``A`` heads, ``G`` groups, ``d`` channels of a head, ``F`` MLP width, ``V`` vocabulary padded
to a multiple of ``128 t``):

- weights: every parameter of the stage, what tensor parallelism cuts divided by ``t``. The last of several stages holds
  a copy of tied embeddings.
- cache of keys and values (inference): ``2 layers b s (G/t) d`` numbers.
- gradients (training): one number a weight, four bytes each in mixed precision too, as Megatron accumulates them.
- optimizer (training): Adam's two moments in fp32, in bf16 also the fp32 weights; divided over data parallel, as
  Megatron's distributed optimizer does.
- activations (training): what the forward pass keeps for the backward pass, below, times the micro-batches that the
  one-forward-one-backward schedule has under way in the stage (``stages - stage``; Narayanan et al., arXiv 2104.04473).

Numbers kept for a token and layer, with Megatron's plain layers (``fused=False``), as counted from torch's saved
tensors: each RMSNorm ``3H + 1`` (input, normalised, output) or LayerNorm ``2H + 2``; attention ``(4A/t)d + (A/t)s``
(query, keys and values repeated for each head, probabilities, output) and the rotary tables; a gated MLP ``4F/t``, one
without a gate ``2F/t``; an expert's token ``H + 5F/t`` and ``H + 3F/t``. With fused kernels (Transformer Engine and
flash attention) a norm keeps ``2H``, attention ``(2A + 2G)d/t`` without probabilities, a gated MLP ``3F/t``; this form
follows the same count and Korthikanti et al. (arXiv 2205.05198), and was not measured. Sequence parallelism divides the
norms' share by ``t``. With ``recompute`` a layer keeps its input ``H`` alone, and one layer at a time is whole. The
last stage adds the final norm and the logits, once as they are and once in fp32 where that is another dtype.

Not counted: what a library allocates for itself, communication buffers, fragmentation, and in inference the few tensors
of the layer at work. A distillation holds the teacher's weights besides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemo_minitron import axes
from nemo_minitron.search.space import Sizes
from nemo_minitron.shape import ModelShape

__all__ = ["MemoryCost", "MemoryUse", "Workload"]

_PADDING = 128  # rows of a vocabulary, times the tensor-parallel size: Megatron's default


@dataclass(frozen=True)
class Workload:
    """What a model is used for, and how it is spread.

    Attributes:
        training: weights, gradients, optimizer and activations; otherwise weights and the cache of keys and values.
        batch_size: sequences of a micro-batch (training), or held in the cache (inference).
        sequence_length: tokens of each.
        bytes: of a weight: 2 or 4.
        recompute: activations within a layer are computed again in the backward pass.
        fused: kernels as on CUDA; False: Megatron's plain layers, as on CPU.
        tensor, pipeline, data: parallel sizes.
        virtual_pipeline: model chunks of a stage, or None for one.
        sequence_parallel: norms and residuals are split over the tensor group.
    """

    training: bool = False
    batch_size: int = 1
    sequence_length: int = 512
    bytes: int = 2
    recompute: bool = False
    fused: bool = True
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    virtual_pipeline: int | None = None
    sequence_parallel: bool = False


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one rank, by part."""

    weights: float = 0.0
    cache: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0

    @property
    def total(self) -> float:
        """All parts."""
        return self.weights + self.cache + self.gradients + self.optimizer + self.activations


class MemoryCost:
    """Bytes of the fullest rank; a :data:`~nemo_minitron.search.space.Cost` that never falls when a size grows.

    Args:
        table: of the family.
        shape: of the unpruned model, for what is not searched.
        work: what the memory is of.
        topk: experts of each token, of a mixture.
        rotary: part of a head's channels that RoPE turns.
    """

    def __init__(
        self,
        table: axes.Family,
        shape: ModelShape,
        work: Workload,
        *,
        topk: int | None = None,
        rotary: float = 1.0,
    ) -> None:
        self.table, self.shape, self.work, self.topk = table, shape, work, topk or 0
        self.rotary = round(shape.head_dim * rotary)
        self._kept: dict[tuple[int, int | None], tuple[float, float, float, float, float, float]] = {}

    def __call__(self, sizes: Sizes) -> float:
        """Bytes in all."""
        return max(rank.total for rank in self.ranks(sizes))

    def fullest(self, sizes: Sizes) -> MemoryUse:
        """The parts of the fullest rank."""
        return max(self.ranks(sizes), key=lambda rank: rank.total)

    def ranks(self, sizes: Sizes) -> list[MemoryUse]:
        """One rank of each pipeline stage, in order."""
        work = self.work
        chunks = work.virtual_pipeline or 1
        each, more = divmod(sizes.num_layers, work.pipeline * chunks)
        return [
            self._rank(sizes, stage, [each + (chunk * work.pipeline + stage < more) for chunk in range(chunks)])
            for stage in range(work.pipeline)
        ]

    def _rank(self, sizes: Sizes, stage: int, chunks: list[int]) -> MemoryUse:
        work, layers = self.work, sum(chunks)
        first, last, constant, by_group, by_head, by_width = self._coefficients(sizes)
        layer = (
            constant
            + by_group * sizes.num_query_groups
            + by_head * sizes.num_attention_heads
            + by_width * sizes.ffn_hidden_size
        )
        ends = (first if stage == 0 else 0.0) + (last if stage == work.pipeline - 1 else 0.0)
        if self.shape.tied_embeddings and 0 < stage == work.pipeline - 1:
            ends += first  # the copy
        weights = ends + layers * layer
        tokens = work.batch_size * work.sequence_length
        if not work.training:
            cached = 2 * layers * tokens * sizes.num_query_groups / work.tensor * self.shape.head_dim
            return MemoryUse(weights * work.bytes, cached * work.bytes)
        return MemoryUse(
            weights * work.bytes,
            gradients=weights * 4,
            optimizer=weights * (8 if work.bytes == 4 else 12) / work.data,
            activations=self._activations(sizes, stage, chunks) * tokens,
        )

    def _activations(self, sizes: Sizes, stage: int, chunks: list[int]) -> float:
        """Bytes kept for each token of a micro-batch."""
        work, layers = self.work, sum(chunks)
        split = work.tensor if work.sequence_parallel else 1
        layer, norm = self._layer(sizes), self._norm(sizes)
        # Micro-batches under way, in chunks: Megatron's warm-up of the plain and of the interleaved schedule.
        count = len(chunks)
        under_way = work.pipeline - stage
        if count > 1:
            under_way = 2 * (work.pipeline - stage - 1) + (count - 1) * work.pipeline + 1
        kept = layers / count * under_way * (sizes.hidden_size / split if work.recompute else layer)
        if work.recompute and layers:
            kept += layer - sizes.hidden_size / split
        kept *= work.bytes
        if stage == work.pipeline - 1:
            logits = self._vocabulary() / work.tensor
            kept += norm * work.bytes + logits * (work.bytes if work.bytes == 4 else work.bytes + 4)
        if stage == 0:
            kept += 16 * under_way / count  # token and position ids, 8 bytes each
        return kept

    def _norm(self, sizes: Sizes) -> float:
        """Numbers that a norm keeps for a token."""
        split = self.work.tensor if self.work.sequence_parallel else 1
        if self.table.normalization == "LayerNorm" or self.work.fused:
            return (2 * sizes.hidden_size + 2) / split
        return (3 * sizes.hidden_size + 1) / split

    def _layer(self, sizes: Sizes) -> float:
        """Numbers that a layer keeps for a token."""
        work, d = self.work, self.shape.head_dim
        heads, groups = sizes.num_attention_heads / work.tensor, sizes.num_query_groups / work.tensor
        if work.fused:
            attention = (2 * heads + 2 * groups) * d
        else:
            attention = 4 * heads * d + heads * work.sequence_length + 4 * self.rotary / work.batch_size
        if self.table.qk_layernorm:
            # the inputs (the queries' and the whole matrix that keys are a part of), normalised again, and the scales
            attention += (3 * heads + 3 * groups) * d + heads + groups
        width = sizes.ffn_hidden_size / work.tensor
        if sizes.num_moe_experts is not None:
            token = sizes.hidden_size + (5 if self.table.gated else 3) * width
            mlp = self.topk * (token + 6) + 1.25 * sizes.num_moe_experts
        elif work.fused:
            mlp = (3 if self.table.gated else 2) * width
        else:
            mlp = (4 if self.table.gated else 2) * width
        return 2 * self._norm(sizes) + attention + mlp

    def _vocabulary(self) -> int:
        step = _PADDING * self.work.tensor
        return -(-self.shape.vocab_size // step) * step

    def _coefficients(self, sizes: Sizes) -> tuple[float, float, float, float, float, float]:
        """Weights of a rank: before the layers, after them, and of a layer: constant, a group, a head, a neuron."""
        key = sizes.hidden_size, sizes.num_moe_experts
        if key not in self._kept:

            def count(groups: int = 1, heads: int = 2, width: int = 1) -> float:
                shape = self._shape(sizes, groups, heads, width)
                return sum(self._size(row, shape) for row in axes.layer_parameters(self.table, shape).values())

            one, shape = count(), self._shape(sizes, 1, 2, 1)
            by_group, by_head, by_width = count(groups=2) - one, one - count(heads=1), count(width=2) - one
            first = sum(self._size(row, shape) for row in self.table.first.values())
            tied = {self.table.output} if self.shape.tied_embeddings else set()
            last = sum(self._size(row, shape) for name, row in self.table.last.items() if name not in tied)
            self._kept[key] = (first, last, one - by_group - 2 * by_head - by_width, by_group, by_head, by_width)
        return self._kept[key]

    def _shape(self, sizes: Sizes, groups: int, heads: int, width: int) -> ModelShape:
        given = Sizes(sizes.hidden_size, groups, heads, sizes.num_moe_experts, 1, width)
        return self.shape.replace(**given._asdict(), vocab_size=self._vocabulary())

    def _size(self, row: axes.Parameter, shape: ModelShape) -> float:
        """Numbers of a parameter on one rank."""
        whole = math.prod(axes.axis_size(axis, shape) for axis in row.axes)
        return whole / (1 if row.tensor_parallel_dim is None else self.work.tensor)
