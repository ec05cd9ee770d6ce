"""How many bytes each rank of a layout needs, before anything is built.

For one rank with tensor parallel ``t``, ``b`` sequences of ``s`` tokens in a micro-batch (of which context parallelism
leaves it ``1/c``), and sizes named as in the
axes table (``H`` hidden, ``A`` heads, ``G`` groups, ``d`` channels of a head, ``F`` MLP width, ``V`` vocabulary padded
to a multiple of ``128 t``):

- weights: every parameter of the stage, what tensor parallelism cuts divided by ``t``. The last of several stages holds
  a copy of tied embeddings.
- cache of keys and values (inference): ``2 layers b s (G/t) d`` numbers.
- gradients (training): one number a weight, four bytes each in mixed precision too, as Megatron accumulates them.
- optimizer (training): Adam's two moments in fp32, in bf16 also the fp32 weights; divided over data and context
  parallel, as Megatron's distributed optimizer does.
- activations (training): what the forward pass keeps for the backward pass, below, times the micro-batches that the
  one-forward-one-backward schedule has under way in the stage (``stages - stage``; Narayanan et al., arXiv 2104.04473).
- teacher (distillation): its weights on the same rank, and on the last stage one ``[s, b, H]`` for each micro-batch of
  a step, which waits for the student there; of several teachers, the sum.

Numbers kept for a token and layer, with Megatron's plain layers (``fused=False``), as counted from torch's saved
tensors: each RMSNorm ``3H + 1`` (input, normalised, output) or LayerNorm ``2H + 2``; attention ``(4A/t)d + (A/t)s``
(query, keys and values repeated for each head, probabilities, output; in bf16 the probabilities in fp32 besides) and
the rotary tables; a gated MLP ``4F/t``, one without a gate ``2F/t``; an expert's token ``H + 5F/t`` and ``H + 3F/t``.
With fused kernels (Transformer Engine and flash attention) a norm keeps ``2H``, a gated MLP ``3F/t``, attention
``(3A + 3G)d/t`` without probabilities: query, key, output, and the matrix of all three that the values are a view of.
This form follows the same count and Korthikanti et al. (arXiv 2205.05198), and was not measured. Sequence parallelism
divides the norms' share by ``t``.

Recomputation, as Megatron's ``recompute_granularity``: "selective" computes the core of the attention again, so the
plain layers keep ``(3A + 3G)d/t`` of it, as the fused ones always do (which gain nothing), and one layer's core at a
time is whole; "full" keeps a layer's input ``H`` alone, and one layer at a time is whole.

The last stage adds the final norm and the logits ``V/t``: once as they are and once in fp32 where that is another
dtype; of a distillation the student's, which become their gradient, the teacher's, and the loss's working buffers. If
the two vocabularies are padded to different sizes, tensor parallelism splits them differently, and the teacher's logits
are held once more, in the student's partition. Of several teachers the logits of one are held at a time, and beside
the student's own one further gradient of that size, two of three teachers or more.
In chunks (``logits: chunks``) there are no logits of all tokens: only a chunk's, of student and teacher, and until the
backward pass the gradients of the output layer, ``V/t H`` numbers of four bytes (in bf16 two besides), and of its
input, ``H`` for each token.

Under context parallelism the plain layers keep the keys and values of all ``s`` tokens (by the same count, but not
measured); Transformer Engine's never hold them.

Not counted: what a library allocates for itself, communication buffers, fragmentation, and in inference the few tensors
of the layer at work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemo_minitron import axes
from nemo_minitron.config.parts import RECOMPUTE, ParallelLayout
from nemo_minitron.planning.counts import LayerCost, SizesLike, layer_cost, layers_of_ranks, outer_counts
from nemo_minitron.planning.model import Model
from nemo_minitron.shape import ModelShape, padded_vocab

__all__ = ["RECOMPUTE", "MemoryCost", "MemoryUse", "Workload"]

#: Working buffers of the vocabulary-parallel losses on CUDA
#: (:mod:`nemo_minitron.distillation.losses.vocabulary_parallel`).
_LOSS_BUFFERS = 4 * 32 * 2**20
#: Of a chunk's logits, without fused kernels and with them (:mod:`nemo_minitron.distillation.losses.fused_head`).
HEAD_BYTES = {False: 96 * 2**20, True: 256 * 2**20}


@dataclass(frozen=True)
class Workload:
    """What a model is used for, and how it is spread.

    Attributes:
        training: weights, gradients, optimizer and activations; otherwise weights and the cache of keys and values.
        batch_size: sequences of a micro-batch (training), or held in the cache (inference).
        sequence_length: tokens of each.
        bytes: of a weight: 2 or 4.
        recompute: of :data:`RECOMPUTE`: what the backward pass computes again.
        chunked: output layer and loss go over chunks of tokens, so that logits are never whole.
        fused: kernels as on CUDA; False: Megatron's plain layers, as on CPU.
        tensor, pipeline, data, context, expert: parallel sizes.
        virtual_pipeline: model chunks of a stage, or None for one.
        sequence_parallel: norms and residuals are split over the tensor group.
        micro_batches: of a step, on one data-parallel rank; what waits of a teacher is of all of them.
    """

    training: bool = False
    batch_size: int = 1
    sequence_length: int = 512
    bytes: int = 2
    recompute: str = "none"
    fused: bool = True
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    virtual_pipeline: int | None = None
    sequence_parallel: bool = False
    micro_batches: int = 1
    context: int = 1
    expert: int = 1
    chunked: bool = False

    @classmethod
    def on(cls, layout: ParallelLayout, **settings: Any) -> Workload:
        """Of a layout; ``settings`` are the attributes that no layout has."""
        return cls(**dataclasses.asdict(layout), **settings)


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one rank, by part."""

    weights: float = 0.0
    cache: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    teacher: float = 0.0

    @property
    def total(self) -> float:
        """All parts."""
        return self.weights + self.cache + self.gradients + self.optimizer + self.activations + self.teacher


class MemoryCost:
    """Bytes of the fullest rank, which never fall when a size grows (a cost of :mod:`nemo_minitron.search.space`).

    Args:
        table: of the family.
        shape: of the unpruned model, for what is not searched.
        work: what the memory is of.
        topk: experts of each token, of a mixture.
        rotary: part of a head's channels that RoPE turns.
        teacher: family and shape of the model that the training distils; None without one.
        further: the same of further teachers on the same ranks.
    """

    def __init__(
        self,
        table: axes.Family,
        shape: ModelShape,
        work: Workload,
        *,
        topk: int | None = None,
        rotary: float = 1.0,
        teacher: tuple[axes.Family, ModelShape] | None = None,
        further: Sequence[tuple[axes.Family, ModelShape]] = (),
    ) -> None:
        self.table, self.shape, self.work, self.topk = table, shape, work, topk or 0
        self.rotary = round(shape.head_dim * rotary)
        self.distilled = teacher is not None
        teachers = [] if teacher is None else [teacher, *further]
        each = [self._teacher_bytes(*one) for one in teachers]
        self._teacher = [sum(stages) for stages in zip(*each, strict=True)] if each else [0.0] * work.pipeline
        self._further_gradients = max(0, min(len(teachers), 3) - 1)
        rows = max((shape.vocab_size for _, shape in teachers), default=0)
        self._teacher_logits = padded_vocab(rows, tensor=work.tensor) / work.tensor
        self._padded = shape.replace(vocab_size=padded_vocab(shape.vocab_size, tensor=work.tensor))
        self._kept: dict[tuple[int, int | None, int], tuple[float, float, LayerCost]] = {}

    @classmethod
    def of(cls, model: Model, work: Workload, teacher: Model | None = None, *further: Model) -> MemoryCost:
        """The cost of a model, and of one that is pruned from it; ``further`` are teachers beside the first."""
        return cls(
            model.table,
            model.shape,
            work,
            topk=model.architecture.moe_router_topk,
            rotary=model.architecture.rotary_percent,
            teacher=None if teacher is None else (teacher.table, teacher.shape),
            further=[(model.table, model.shape) for model in further],
        )

    def __call__(self, sizes: SizesLike) -> float:
        """Bytes in all."""
        return max(rank.total for rank in self.ranks(sizes))

    def fullest(self, sizes: SizesLike) -> MemoryUse:
        """The parts of the fullest rank."""
        return max(self.ranks(sizes), key=lambda rank: rank.total)

    def ranks(self, sizes: SizesLike) -> list[MemoryUse]:
        """One rank of each pipeline stage, in order."""
        work = self.work
        layers = layers_of_ranks(sizes, pipeline=work.pipeline, virtual_pipeline=work.virtual_pipeline)
        return [self._rank(sizes, stage, list(kinds.items())) for stage, kinds in enumerate(layers)]

    def _teacher_bytes(self, table: axes.Family, shape: ModelShape) -> list[float]:
        """Of each pipeline stage: weights, and what waits for the student."""
        work = self.work
        inference = Workload(
            batch_size=0,
            bytes=work.bytes,
            tensor=work.tensor,
            pipeline=work.pipeline,
            virtual_pipeline=work.virtual_pipeline,
            expert=work.expert if shape.num_moe_experts is not None else 1,
        )
        stages = [rank.weights for rank in MemoryCost(table, shape, inference).ranks(shape)]
        split = work.tensor if work.sequence_parallel else 1
        tokens = work.batch_size * work.sequence_length / work.context * work.micro_batches
        stages[-1] += tokens * shape.hidden_size / split * work.bytes
        return stages

    def _rank(self, sizes: SizesLike, stage: int, layers: Sequence[tuple[SizesLike, int]]) -> MemoryUse:
        """``sizes`` are of the model, ``layers`` those of the stage: how many of which sizes."""
        work = self.work
        first, last, _ = self._weights(sizes)
        ends = (first if stage == 0 else 0.0) + (last if stage == work.pipeline - 1 else 0.0)
        if self.shape.tied_embeddings and 0 < stage == work.pipeline - 1:
            ends += first  # the copy
        weights = ends + sum(count * self._weights(layer)[2].parameters(layer) for layer, count in layers)
        # The optimizer's state of experts is shared out over the replicas that hold the same ones: it is as much as
        # that of all experts over all replicas.
        kept = ends + sum(count * self._weights(layer, expert=1)[2].parameters(layer) for layer, count in layers)
        tokens = work.batch_size * work.sequence_length
        if not work.training:
            cached = sum(
                2 * count * tokens * layer.num_query_groups / work.tensor * self.shape.head_dim
                for layer, count in layers
            )
            return MemoryUse(weights * work.bytes, cached * work.bytes)
        activations = self._activations(sizes, stage, layers) * tokens / work.context
        if stage == work.pipeline - 1:
            activations += self._head(sizes, tokens / work.context)
        return MemoryUse(
            weights * work.bytes,
            gradients=weights * 4,
            optimizer=kept * (8 if work.bytes == 4 else 12) / (work.data * work.context),
            activations=activations,
            teacher=self._teacher[stage],
        )

    def _activations(self, sizes: SizesLike, stage: int, layers: Sequence[tuple[SizesLike, int]]) -> float:
        """Bytes kept for each token of a micro-batch."""
        work = self.work
        split = work.tensor if work.sequence_parallel else 1
        whole, norm = [(self._layer(layer), there) for layer, there in layers if there], self._norm(sizes)
        # Micro-batches under way, in chunks: Megatron's warm-up of the plain and of the interleaved schedule.
        count = work.virtual_pipeline or 1
        under_way = work.pipeline - stage
        if count > 1:
            under_way = 2 * (work.pipeline - stage - 1) + (count - 1) * work.pipeline + 1
        full = work.recompute == "full"
        kept = sum(there / count * under_way * (sizes.hidden_size / split if full else layer) for layer, there in whole)
        if full and whole:
            kept += max(whole)[0] - sizes.hidden_size / split
        if work.recompute == "selective" and whole and not work.fused:
            heads = max(layer.num_attention_heads for layer, there in layers if there) / work.tensor
            kept += heads * (2 * work.context * self.shape.head_dim + self._probabilities())
        kept *= work.bytes
        if stage == work.pipeline - 1:
            logits = self._columns
            if work.chunked:
                kept += sizes.hidden_size / split * work.bytes  # the gradient of the output layer's input
            elif self.distilled:
                moved = logits if work.tensor > 1 and self._teacher_logits != logits else 0
                kept += (logits * (1 + self._further_gradients) + self._teacher_logits + moved) * work.bytes
            else:
                kept += logits * (work.bytes if work.bytes == 4 else work.bytes + 4)
            kept += norm * work.bytes
        if stage == 0:
            kept += 16 * under_way / count  # token and position ids, 8 bytes each
        return kept

    @property
    def _columns(self) -> float:
        """Of a rank's logits."""
        return padded_vocab(self.shape.vocab_size, tensor=self.work.tensor) / self.work.tensor

    def _head(self, sizes: SizesLike, tokens: float) -> float:
        """Bytes at output layer and loss that are not of each token: buffers, and in chunks a gradient."""
        work = self.work
        held = _LOSS_BUFFERS if self.distilled and work.fused else 0.0
        if not work.chunked:
            return held
        chunk = min(tokens, HEAD_BYTES[work.fused] / (self._columns * work.bytes))
        held += chunk * (self._columns + self._teacher_logits) * work.bytes
        return held + self._columns * sizes.hidden_size * (4 if work.bytes == 4 else 6)

    def _norm(self, sizes: SizesLike) -> float:
        """Numbers that a norm keeps for a token."""
        split = self.work.tensor if self.work.sequence_parallel else 1
        if self.table.normalization == "LayerNorm" or self.work.fused:
            return (2 * sizes.hidden_size + 2) / split
        return (3 * sizes.hidden_size + 1) / split

    def _probabilities(self) -> float:
        """Numbers that a head keeps of a token's attention to all others: in bf16 the softmax works in fp32."""
        return self.work.sequence_length * (1 if self.work.bytes == 4 else 3)

    def _layer(self, sizes: SizesLike) -> float:
        """Numbers that a layer keeps for a token; of a part that it lacks, none."""
        work, d = self.work, self.shape.head_dim
        heads, groups = sizes.num_attention_heads / work.tensor, sizes.num_query_groups / work.tensor
        whole = work.fused or work.recompute == "selective"  # the matrix of queries, keys and values stays
        if whole:
            attention = (3 * heads + 3 * groups) * d
        else:
            attention = (
                (2 + 2 * work.context) * heads * d + heads * self._probabilities() + 4 * self.rotary / work.batch_size
            )
        if self.table.qk_layernorm:
            # the inputs (the queries' and the whole matrix that keys are a part of), normalised again, and the scales
            attention += (2 * heads + groups if whole else 3 * heads + 3 * groups) * d + heads + groups
        width = sizes.ffn_hidden_size / work.tensor
        if sizes.num_moe_experts is not None:
            token = sizes.hidden_size + (5 if self.table.gated else 3) * width
            mlp = self.topk * (token + 6) + 1.25 * sizes.num_moe_experts
        elif work.fused:
            mlp = (3 if self.table.gated else 2) * width
        else:
            mlp = (4 if self.table.gated else 2) * width
        norms = (2 if self.table.post_norms else 1) * self._norm(sizes)
        if not sizes.num_query_groups:
            return norms + mlp
        if not sizes.ffn_hidden_size:
            return norms + attention
        return 2 * norms + attention + mlp

    def _weights(self, sizes: SizesLike, *, expert: int | None = None) -> tuple[float, float, LayerCost]:
        """Weights of a rank: before the layers, after them, and of a layer."""
        hidden, experts, tensor = sizes.hidden_size, sizes.num_moe_experts, self.work.tensor
        key = hidden, experts, expert or self.work.expert
        if key not in self._kept:
            self._kept[key] = (
                *outer_counts(self.table, self._padded, hidden_size=hidden, tensor=tensor),
                layer_cost(
                    self.table,
                    hidden_size=hidden,
                    head_dim=self.shape.head_dim,
                    experts=experts,
                    tensor=tensor,
                    expert=key[2],
                ),
            )
        return self._kept[key]
