"""Move rows between tensor-parallel ranks, so that after width pruning each holds an equal share of the kept rows."""

from __future__ import annotations

import torch
import torch.distributed as dist

from nemo_minitron import axes

__all__ = ["MESSAGE_BYTES", "take_rows"]

#: The largest message, unless one row is larger.
MESSAGE_BYTES = 16 * 2**20


def take_rows(
    local: torch.Tensor, axis: axes.Axis, dim: int, keep: torch.Tensor, size: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """This rank's equal share of the kept rows of a dimension that tensor parallelism cuts.

    Collective over ``group``. A row is sent only if it is kept and its new rank is another, and only to that rank.
    Memory beyond ``local`` and the share that is returned: one message sent and one received, each of at most
    :data:`MESSAGE_BYTES` or one row.

    Args:
        local: this rank's shard of the unpruned parameter.
        axis, dim: axis of the dimension that is pruned, and its number.
        keep: ``[n]`` int64 global rows that stay, in their new order; -1 for a row of zeros (vocabulary padding).
        size: global length of the unpruned dimension.
        group: tensor-parallel.

    Raises:
        ShapeError: if the kept rows do not divide over the group.
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    # Of each global row: the rank that holds it, and where there. Row -1 is nobody's.
    holder, place = (torch.full((size + 1,), -1, device=keep.device) for _ in range(2))
    for other in range(world):
        held = axes.shard_rows(axis, size, rank=other, world=world).to(keep.device)
        holder[held] = other
        place[held] = torch.arange(len(held), device=keep.device)
    wanted = [keep[axes.shard_rows(axis, len(keep), rank=other, world=world).to(keep.device)] for other in range(world)]
    mine = wanted[rank]
    if bool((holder[mine] == rank).all()) and all(
        bool((holder[wanted[to]] != rank).all()) for to in _others(rank, world)
    ):
        return local.index_select(dim, place[mine])
    share = local.new_zeros([len(mine) if at == dim else length for at, length in enumerate(local.shape)])
    rows = max(1, MESSAGE_BYTES * local.shape[dim] // max(1, local.numel() * local.element_size()))
    for positions in (holder[mine] == rank).nonzero().flatten().split(rows):
        share.index_copy_(dim, positions, local.index_select(dim, place[mine[positions]]))
    for to in _others(rank, world):
        source = (2 * rank - to) % world  # as far behind as `to` is ahead
        outgoing = place[wanted[to][holder[wanted[to]] == rank]].split(rows)
        incoming = (holder[mine] == source).nonzero().flatten().split(rows)
        for message in range(max(len(outgoing), len(incoming))):
            send = outgoing[message] if message < len(outgoing) else keep[:0]
            receive = incoming[message] if message < len(incoming) else keep[:0]
            _exchange(local, send, to, share, receive, source, dim, group)
    return share


def _exchange(
    local: torch.Tensor,
    send: torch.Tensor,
    to: int,
    share: torch.Tensor,
    receive: torch.Tensor,
    source: int,
    dim: int,
    group: dist.ProcessGroup,
) -> None:
    """Send the rows ``send`` of ``local`` to one rank, and receive the rows ``receive`` of ``share`` from another."""
    operations = []
    if len(send):
        sent = local.index_select(dim, send)
        operations.append(dist.P2POp(dist.isend, sent, dist.get_global_rank(group, to), group))
    if len(receive):
        received = local.new_empty([len(receive) if at == dim else length for at, length in enumerate(local.shape)])
        operations.append(dist.P2POp(dist.irecv, received, dist.get_global_rank(group, source), group))
    for request in dist.batch_isend_irecv(operations) if operations else []:
        request.wait()
    if len(receive):
        share.index_copy_(dim, receive, received)


def _others(rank: int, world: int) -> list[int]:
    """The other ranks, from the next one on."""
    return [(rank + step) % world for step in range(1, world)]
