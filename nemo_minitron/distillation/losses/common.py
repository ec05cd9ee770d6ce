"""The part of two vocabularies that a divergence is over, and how a teacher's columns get to the student's partition.

Megatron pads a vocabulary to a multiple of ``128 tp`` and splits it evenly. So a rank of a tensor-parallel group may
hold other columns of the teacher's logits than of the student's, where their vocabularies differ in size.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nemo_minitron.distillation.losses.kernels import Columns

__all__ = ["LEFT_OUT", "CommonTokens", "repartition"]

LEFT_OUT = -1e25
"""Logit of a token that takes no part: its exponential is exactly 0 beside any other, and it stays finite when it is
divided by a temperature, so no infinity is subtracted from another."""


@dataclass(frozen=True)
class CommonTokens:
    """The tokens that a divergence of teacher and student is over: those below ``size`` that are not left out.

    Both distributions are normalised over these tokens.

    Attributes:
        size: rows that both vocabularies have.
        left_out: token ids below ``size`` that mean something else to each, ascending.
    """

    size: int
    left_out: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.size - len(self.left_out)

    def outside(self, columns: Columns) -> list[int]:
        """Columns of a rank, among its valid ones, that take no part."""
        first, end = columns.first, columns.first + columns.valid
        begin, stop = (bisect_left(self.left_out, edge) for edge in (first, end))
        return [
            *(number - first for number in self.left_out[begin:stop]),
            *range(max(self.size - first, 0), columns.valid),
        ]


def taking_part(
    name: str, logits: torch.Tensor, like: torch.Tensor, outside: torch.Tensor, columns: Columns
) -> torch.Tensor:
    """A copy of logits in which the tokens that take no part have the logit :data:`LEFT_OUT`.

    Args:
        name: of the wide buffer that holds it.
        logits: ``[n, c]``, of which the first columns are taken; the copy of fewer is filled up.
        like: ``[n, valid]``, has the copy's shape.
        outside: indices of the columns that take no part.
        columns: of this rank.

    Returns:
        ``[n, valid]``, float32 or wider.
    """
    copy, width = columns.buffer(name, like), min(logits.shape[-1], like.shape[-1])
    copy[:, :width] = logits[:, :width]
    copy[:, width:] = LEFT_OUT
    return copy.index_fill_(-1, outside, LEFT_OUT)


@torch.no_grad()
def repartition(logits: torch.Tensor, columns: int, rows: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Move columns of logits to the ranks that hold them in another partition. Collective over the group.

    Each rank sends the ranges of its columns that others need, and no rank holds more than its own columns in both
    partitions. Communication: one all-to-all; a rank of number r sends about ``r |c - columns|`` columns.

    Args:
        logits: ``[..., c]``; the group's rank r holds columns ``r c`` to ``(r + 1) c - 1``.
        columns: wanted on each rank, in the same order.
        rows: columns from there on are not needed.
        group: tensor-parallel group.

    Returns:
        ``[..., columns]``; columns from ``rows`` on are 0.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    flat, held = logits.reshape(-1, logits.shape[-1]), logits.shape[-1]
    moved = flat.new_zeros(len(flat), columns)
    sends = [_shared(rank, held, other, columns, rows) for other in range(world)]
    receives = [_shared(other, held, rank, columns, rows) for other in range(world)]
    # What stays on this rank goes through no message.
    start, stop = sends[rank]
    moved[:, start - rank * columns : stop - rank * columns] = flat[:, start - rank * held : stop - rank * held]
    sends[rank] = receives[rank] = (0, 0)
    parts = [flat[:, a - rank * held : b - rank * held].reshape(-1) for a, b in sends if b > a]
    arrived = flat.new_empty(len(flat) * sum(b - a for a, b in receives))
    dist.all_to_all_single(
        arrived,
        torch.cat(parts) if parts else flat.new_empty(0),
        [len(flat) * (b - a) for a, b in receives],
        [len(flat) * (b - a) for a, b in sends],
        group=group,
    )
    for (a, b), part in zip(receives, arrived.split([len(flat) * (b - a) for a, b in receives]), strict=True):
        if b > a:
            moved[:, a - rank * columns : b - rank * columns] = part.view(len(flat), b - a)
    return moved.view(*logits.shape[:-1], columns)


def _shared(sender: int, held: int, receiver: int, columns: int, rows: int) -> tuple[int, int]:
    """Range of the columns that one rank holds and another needs; empty as ``(n, n)``."""
    start = max(sender * held, receiver * columns)
    stop = min((sender + 1) * held, (receiver + 1) * columns, rows)
    return start, max(start, stop)
