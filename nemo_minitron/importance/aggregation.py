"""Aggregations: one number for a unit from its activations over a sequence, or its scores over a batch.

Each is written as statistics that are summed (or maximised), so that it can go through the data batch by batch in
O(units) memory, and be combined over process groups without a second pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from nemo_minitron.errors import ConfigError

__all__ = ["AGGREGATIONS", "Aggregation", "Criterion", "aggregation", "gathered"]


@dataclass(frozen=True)
class Aggregation:
    """One way to aggregate ``n`` values ``x_1 .. x_n`` of each unit (arXiv 2407.14679, section 2.2).

    Attributes:
        name: key in :data:`AGGREGATIONS`.
        statistics: ``(x, dim) -> [k, ...]``: ``k`` statistics of ``x`` over ``dim``, which is removed; in fp32 or
            wider.
        finish: ``([k, ...], n) -> [...]``: the value from the combined statistics of all ``n``.
        maximum: statistics combine by maximum instead of by sum.
    """

    name: str
    statistics: Callable[[torch.Tensor, int], torch.Tensor]
    finish: Callable[[torch.Tensor, int], torch.Tensor]
    maximum: bool = False

    def combine(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Statistics of two disjoint sets of values -> those of their union."""
        return torch.maximum(one, other) if self.maximum else one + other

    def all_reduce(self, statistics: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """Combine over a process group, in place; every rank gets the result."""
        if dist.get_world_size(group) > 1 and statistics.numel():
            dist.all_reduce(statistics, dist.ReduceOp.MAX if self.maximum else dist.ReduceOp.SUM, group=group)
        return statistics


class Criterion(NamedTuple):
    """The two aggregations by which an estimator's values become scores.

    Attributes:
        sequence: aggregation over the tokens of a sample, a key of :data:`AGGREGATIONS`. The Taylor estimator has one
            of its own, "sum", and so have the magnitude of weights and the losses after reconstruction, "none".
        batch: aggregation over samples, a key of :data:`AGGREGATIONS` ("none" for the last two).
    """

    sequence: str
    batch: str


def _norm(x: torch.Tensor, order: float, dim: int) -> torch.Tensor:
    # vector_norm makes no copy of |x|; bf16 activations are added up in fp32
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, ord=order, dim=dim, dtype=wide)


def _absolute_sum(x: torch.Tensor, dim: int) -> torch.Tensor:
    return _norm(x, 1, dim)[None]


def _square_sum(x: torch.Tensor, dim: int) -> torch.Tensor:
    return _norm(x, 2, dim).square()[None]


def _absolute_maximum(x: torch.Tensor, dim: int) -> torch.Tensor:
    return _norm(x, float("inf"), dim)[None]


def _moments(x: torch.Tensor, dim: int) -> torch.Tensor:
    # float64: the variance is a difference of two nearly equal numbers
    x = x.double()
    return torch.stack([x.sum(dim), x.square().sum(dim)])


def _variance(moments: torch.Tensor, n: int) -> torch.Tensor:
    mean, mean_square = moments / n
    # clamp keeps NaN and inf, which the caller looks for
    return (mean_square - mean.square()).clamp(min=0)


AGGREGATIONS: dict[str, Aggregation] = {
    one.name: one
    for one in (
        # (1/n) sum |x_i|
        Aggregation("mean", _absolute_sum, lambda stats, n: stats[0] / n),
        # sum |x_i|
        Aggregation("l1", _absolute_sum, lambda stats, n: stats[0]),
        # sqrt(sum x_i^2)
        Aggregation("l2", _square_sum, lambda stats, n: stats[0].sqrt()),
        # (1/n) sum (x_i - mean x)^2
        Aggregation("variance", _moments, _variance),
        # max |x_i|
        Aggregation("max", _absolute_maximum, lambda stats, n: stats[0], maximum=True),
    )
}


def aggregation(name: str, where: str) -> Aggregation:
    """The aggregation of a name; ``where`` is the setting that the error names.

    Raises:
        ConfigError: for a name that is not in :data:`AGGREGATIONS`.
    """
    if name not in AGGREGATIONS:
        raise ConfigError(f"{where}={name!r}: must be one of {', '.join(AGGREGATIONS)}")
    return AGGREGATIONS[name]


def gathered(local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """``[units/world, ...]`` -> ``[units, ...]``: Megatron cuts heads and neurons into equal runs by rank."""
    world = dist.get_world_size(group)
    if world == 1:
        return local
    parts = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(world)]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts)
