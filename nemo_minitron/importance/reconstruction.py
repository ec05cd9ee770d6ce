"""Importance after reconstruction: what a unit costs once the units that stay have made up for it.

The numbers are those of :mod:`~nemo_minitron.importance.elimination`, for the matrices that read the units:

- FFN neurons: the down projection, of every expert where the MLP is a mixture.
- heads, and query groups: the attention's projection, whose inputs are blocks of ``head_dim`` columns. Heads go from
  all groups evenly, as pruning takes them.
- hidden channels: QKV, gate and up projections, and routers, of the normalised residual stream. Each channel is taken
  alone, and its loss relative to the matrix's outputs is added up over the matrices.

Tokens count as in a reconstruction (:mod:`nemo_minitron.reconstruction.fitting`): those of matrices that write to the
residual stream relative to the size of the stream after the part, so that the few tokens with massive activations do
not decide. Layers have their block influence. Nothing linear makes up for an expert, whose tokens go to other experts:
its score is the square of what it adds to the stream, summed over the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nemo_minitron.importance.aggregation import Aggregation, Criterion, gathered
from nemo_minitron.importance.elimination import alone, eliminate
from nemo_minitron.importance.hooks import BlockInfluence, Key, Reading
from nemo_minitron.runtime.groups import Groups
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

__all__ = ["ReconstructionRecorder"]

#: Sites whose tokens count relative to the stream that they write to.
_WRITERS = ("attention", "ffn", "experts")
#: Sites whose units are split over the tensor-parallel ranks.
_SPLIT = ("attention", "groups", "ffn")


class ReconstructionRecorder(BlockInfluence):
    """Sums of products of inputs; at the end of a layer, the losses of its units.

    Memory: of each layer in the chunks ``[F/tp, F]`` (of every expert), ``[A * head_dim / tp, A * head_dim]`` and two
    ``[H, H]`` float64 sums, and the inputs of a micro-batch in one layer. A streamed pass has one layer's.
    """

    def __init__(self, chunks: Sequence[GPTModel], groups: Groups, criteria: Sequence[Criterion]) -> None:
        super().__init__(chunks, groups, criteria)
        (self._criterion,) = self.criteria
        self._waiting: list[Reading] = []  # until the stream after their part is known

    def batch_aggregation(self, criterion: Criterion) -> Aggregation:
        """Losses are of all samples together; the ranks that do not have one give zeros."""
        return Aggregation("none", lambda x, dim: x.sum(dim)[None], lambda statistics, n: statistics[0])

    # ------------------------------------------------------------------------------------------------- the forward pass

    def _hook_layer(self, layer: Any) -> list[Any]:
        def record_middle(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            self._write(args[0], normalised=hasattr(layer.self_attention.linear_proj, "post_layernorm"))

        # Where the norm is fused into the next linear, this module passes its input on.
        return [layer.pre_mlp_layernorm.register_forward_pre_hook(record_middle), *super()._hook_layer(layer)]

    @torch.no_grad()
    def read(self, reading: Reading) -> None:
        """Keep what writes to the stream until the stream is known; add what reads it."""
        reading = reading._replace(x=reading.x.detach())
        if reading.key.site in _WRITERS:
            self._waiting.append(reading)
        else:
            self._add(reading.key, reading.x[:, : self.rows].flatten(0, 1))

    @torch.no_grad()
    def read_block(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add what the MLP wrote, and the layer's block influence."""
        (module,) = (module for module in self.modules() if module.layer_number - 1 == layer)
        self._write(after, normalised=hasattr(getattr(module.mlp, "linear_fc2", None), "post_layernorm"))
        super().read_block(layer, before, after)

    def _write(self, stream: torch.Tensor, *, normalised: bool) -> None:
        """Add the inputs of what wrote to ``[s (/tp), b, H]`` stream; where it is normalised, tokens count alike."""
        waiting, self._waiting = self._waiting, []
        stream = stream.detach()[:, : self.rows]
        wide = stream.to(torch.promote_types(stream.dtype, torch.float32))
        weights = wide.square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny).rsqrt()  # [s (/tp), b]
        if normalised:
            weights = torch.ones_like(weights)
        weights = self._whole(weights, mixture=any(reading.places is not None for reading in waiting))
        for key, x, width, _, partial, places in waiting:
            if places is None:
                inputs, weight = x[:, : self.rows].flatten(0, 1), weights.flatten()
            else:
                inputs, weight = x[places.rows], weights.flatten()[places.places]
            if partial and self.groups.layout.tensor > 1:
                inputs = inputs.contiguous().clone()
                dist.all_reduce(inputs, group=self.groups.tp)
            inputs = inputs.double() * weight.double()[:, None]
            if key.site == "experts":
                self._keep(key, inputs.square().sum().view(1, 1) / width)
            else:
                self._add(key, inputs)

    def _whole(self, weights: torch.Tensor, *, mixture: bool) -> torch.Tensor:
        """``[s (/tp), b]`` -> ``[s, b]``, in a mixture of the samples of all expert-parallel ranks. Collective."""
        layout = self.groups.layout
        if layout.sequence_parallel and layout.tensor > 1:
            weights = gathered(weights, self.groups.tp)
        if not mixture or layout.expert == 1:
            return weights
        counts = [torch.zeros(1, dtype=torch.int64, device=weights.device) for _ in range(layout.expert)]
        dist.allgathered(counts, torch.tensor([weights.shape[1]], device=weights.device), group=self.groups.ep)
        most = max(int(count) for count in counts)
        filled = torch.nn.functional.pad(weights, (0, most - weights.shape[1])).contiguous()
        parts = [torch.empty_like(filled) for _ in counts]
        dist.allgathered(parts, filled, group=self.groups.ep)
        return torch.cat([part[:, : int(count)] for part, count in zip(parts, counts, strict=True)], dim=1)

    def _add(self, key: Key, inputs: torch.Tensor) -> None:
        """Add ``[tokens, k]`` inputs; of a site that is split, with those of all tensor-parallel ranks."""
        inputs = inputs.double()
        split = key.site in _SPLIT and self.groups.layout.tensor > 1
        others = gathered(inputs.T.contiguous(), self.groups.tp).T if split else inputs
        self._keep(key, inputs.T @ others)

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
        readers = {"input_norm": [layer.self_attention.linear_qkv.weight], "mlp_norm": []}
        mixture = hasattr(layer.mlp, "router")
        if not mixture:
            readers["mlp_norm"].append(layer.mlp.linear_fc1.weight)
        groups, split = self.groups, self.groups.layout.tensor > 1
        for site, weights in readers.items():
            key = Key(layer.layer_number - 1, site)
            gram = self._summed(key, layer.self_attention.linear_qkv.weight.shape[1])
            if split and groups.layout.sequence_parallel:
                dist.all_reduce(gram, group=groups.tp)
            outers = [_outer(weight) for weight in weights]
            if site == "mlp_norm" and mixture:
                outers.append(sum(_outer(expert.linear_fc1.weight) for expert in layer.mlp.experts.local_experts))
                if groups.layout.expert > 1:
                    dist.all_reduce(outers[-1], group=groups.ep)
            for outer in outers if split else ():
                dist.all_reduce(outer, group=groups.tp)
            if site == "mlp_norm" and mixture:
                outers.append(_outer(layer.mlp.router.weight))  # whole on every rank
            self._put(key, torch.stack([alone(gram, outer) for outer in outers]).sum(0))

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
