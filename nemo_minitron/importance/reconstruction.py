"""Importance after reconstruction: what a unit costs once the units that stay have made up for it.

The numbers are those of :mod:`~nemo_minitron.importance.elimination`, for the matrices that read the units:

- FFN neurons: the down projection, of every expert where the MLP is a mixture.
- heads, and query groups: the attention's projection, whose inputs are blocks of ``head_dim`` columns. Heads go from
  all groups evenly, as pruning takes them.

Tokens count alike, as in a reconstruction. Nothing linear makes up for an expert, whose tokens go to other experts: its
score is the square of what it adds to the stream, summed over the tokens. Layers have their block influence, and hidden
channels the papers' score, ``sqrt(sum_b (1/s sum_t |a|)^2)`` of the normalised residual stream (arXiv 2407.14679,
section 2.2): every matrix loses the same channels, so that their order would need the sums of all layers at once, and
losses of each channel alone chose worse channels than the papers' score (docs/results.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nemo_minitron.importance.aggregation import AGGREGATIONS, Aggregation, Criterion, gathered
from nemo_minitron.importance.elimination import eliminate
from nemo_minitron.importance.hooks import BlockInfluence, Key, Reading
from nemo_minitron.runtime.groups import Groups
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

__all__ = ["ReconstructionRecorder"]

#: Sites whose units are split over the tensor-parallel ranks.
_SPLIT = ("attention", "groups", "ffn")
#: Sites of the hidden channels.
_NORMS = ("input_norm", "mlp_norm")


class ReconstructionRecorder(BlockInfluence):
    """Sums of products of inputs; at the end of a layer, the losses of its units.

    Memory: of each layer in the chunks ``[F/tp, F]`` (of every expert) and ``[A * head_dim / tp, A * head_dim]``
    float64 sums, and the inputs of a micro-batch in one layer. A streamed pass has one layer's.
    """

    def __init__(self, chunks: Sequence[GPTModel], groups: Groups, criteria: Sequence[Criterion]) -> None:
        super().__init__(chunks, groups, criteria)
        (self._criterion,) = self.criteria

    def batch_aggregation(self, criterion: Criterion) -> Aggregation:
        """Losses are of all samples together; the ranks that do not have one give zeros."""
        return Aggregation("none", lambda x, dim: x.sum(dim)[None], lambda statistics, n: statistics[0])

    # ------------------------------------------------------------------------------------------------- the forward pass

    @torch.no_grad()
    def read(self, reading: Reading) -> None:
        """Add the products of inputs; of a site that is split, with those of all tensor-parallel ranks."""
        if reading.key.site in _NORMS:
            self._keep(reading.key, self._channel_squares(reading))
            return
        key, x, split = reading.key, reading.x.detach(), self.groups.layout.tensor > 1
        inputs = x[:, : self.rows].flatten(0, 1) if reading.places is None else x[reading.places.rows]
        if reading.partial and split:
            inputs = inputs.contiguous().clone()
            dist.all_reduce(inputs, group=self.groups.tp)
        inputs = inputs.double()
        if key.site == "experts":
            self._keep(key, inputs.square().sum().view(1, 1))
        else:
            whole = gathered(inputs.T.contiguous(), self.groups.tp).T if split else inputs
            self._keep(key, inputs.T @ whole)

    def _channel_squares(self, reading: Reading) -> torch.Tensor:
        """``[H]``: the squares of the samples' means of ``|a|``, summed over the samples."""
        means = self.over_sequence(reading, reading.x.detach()[:, : self.rows], AGGREGATIONS["mean"])  # [b, H]
        return means.double().square().sum(0)

    def _keep(self, key: Key, sums: torch.Tensor) -> None:
        kept = self.statistics.setdefault(key, {})
        kept[self._criterion] = kept[self._criterion].add_(sums) if self._criterion in kept else sums

    # ---------------------------------------------------------------------------------------------- the end of a layer

    @torch.no_grad()
    def finish(self) -> None:
        """Put the losses of the units in the place of the sums, for the layers in the chunks. Collective."""
        for layer in self.modules():
            self._finish_attention(layer)
            self._finish_hidden(layer)
            if not hasattr(layer.mlp, "router"):
                self._finish_ffn(layer, 0, layer.mlp.linear_fc2, layer.mlp.linear_fc2)
                continue
            held = dict(zip(layer.mlp.local_expert_indices, layer.mlp.experts.local_experts, strict=True))
            like = layer.mlp.experts.local_experts[0].linear_fc2
            for expert in range(layer.mlp.config.num_moe_experts):
                # Every data-parallel rank takes part, although an expert is on some of them.
                self._finish_ffn(layer, expert, held[expert].linear_fc2 if expert in held else None, like)

    def _finish_attention(self, layer: Any) -> None:
        index, attention = layer.layer_number - 1, layer.self_attention
        gram, outer = self._matrices(Key(index, "attention"), attention.linear_proj, attention.linear_proj)
        tensor = self.groups.layout.tensor
        heads, groups = (
            tensor * count
            for count in (attention.num_attention_heads_per_partition, attention.num_query_groups_per_partition)
        )
        width, per_group = len(gram) // heads, heads // groups
        self._put(Key(index, "attention"), eliminate(gram, outer, width, per_group=per_group))
        self._put(Key(index, "groups"), eliminate(gram, outer, width * per_group))

    def _finish_ffn(self, layer: Any, expert: int, module: Any, like: Any) -> None:
        key = Key(layer.layer_number - 1, "ffn", expert)
        self._put(key, eliminate(*self._matrices(key, module, like)), held=module is not None)

    def _finish_hidden(self, layer: Any) -> None:
        for site in _NORMS:
            key = Key(layer.layer_number - 1, site)
            self._put(key, self._summed(key, layer.self_attention.linear_qkv.weight.shape[1]).sqrt())

    # ------------------------------------------------------------------------------------------------- between ranks

    def _matrices(self, key: Key, module: Any, like: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """``G`` and ``W'W`` of a row-parallel linear, whole on every rank. Collective.

        Args:
            key: of its inputs.
            module: the linear; None where another rank has the expert.
            like: a linear of its size.
        """
        groups = self.groups
        gram = self._summed(key, like.weight.shape[1])
        if groups.layout.tensor > 1:
            gram = gathered(gram, groups.tp)
            gram = (gram + gram.T) / 2  # the ranks' sums differ in their rounding
        if module is None:
            return gram, torch.zeros_like(gram)
        weight = module.weight.detach()
        if groups.layout.tensor > 1:
            weight = gathered(weight.T.contiguous(), groups.tp).T
        return gram, _outer(weight)

    def _summed(self, key: Key, columns: int) -> torch.Tensor:
        """``[columns, k]`` sums of this rank's columns over the tokens of all data-parallel ranks. Collective."""
        groups, sums = self.groups, self.statistics.get(key, {}).get(self._criterion)
        if sums is None:  # an expert that this rank's samples did not reach
            whole = columns * (groups.layout.tensor if key.site in _SPLIT else 1)
            sums = torch.zeros(columns, whole, dtype=torch.float64, device=groups.device.torch)
        if groups.layout.data > 1:
            dist.all_reduce(sums, group=groups.dp)
        return sums

    def _put(self, key: Key, losses: torch.Tensor, *, held: bool = True) -> None:
        """Keep this rank's units of ``[units]`` losses, on the first data-parallel rank that has them. Collective."""
        groups = self.groups
        first = torch.tensor(groups.dp_rank if held else groups.layout.data, device=groups.device.torch)
        if groups.layout.data > 1:
            dist.all_reduce(first, dist.ReduceOp.MIN, group=groups.dp)
        if groups.layout.tensor > 1 and key.site in _SPLIT:
            losses = losses.chunk(groups.layout.tensor)[groups.tp_rank]
        mine = losses if int(first) == groups.dp_rank else torch.zeros_like(losses)
        self.statistics.setdefault(key, {})[self._criterion] = mine[None]

    def group_scores(
        self, units: Callable[[str, int], torch.Tensor], heads: torch.Tensor, shape: ModelShape
    ) -> torch.Tensor:
        """``[L, G]``, by their own losses. Collective."""
        return units("groups", shape.num_query_groups)


def _outer(weight: torch.Tensor) -> torch.Tensor:
    """``[m, k]`` -> ``W'W`` in float64."""
    wide = weight.detach().double()
    return wide.T @ wide
