"""The places of an expert's tokens in the micro-batch.

Megatron's dispatchers give each expert its tokens as one list. They are put back in their places, to be aggregated
sample by sample as all other activations are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from nemo_minitron.runtime.groups import Groups

__all__ = ["TokenPlaces", "token_places"]


@dataclass(frozen=True)
class TokenPlaces:
    """Places of one expert's tokens.

    Attributes:
        rows: ``[m]`` positions in the expert's list of the tokens that count.
        places: ``[m]`` their places ``t * b + sample`` in the micro-batch.
        length: ``s``, of the whole sequence.
        batch: ``b``, samples that count, of all expert-parallel ranks.
    """

    rows: torch.Tensor
    places: torch.Tensor
    length: int
    batch: int

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """``[tokens, units]`` of the expert -> ``[s, b, units]``, zero where a token went to other experts."""
        full = x.new_zeros(self.length * self.batch, x.shape[-1])
        full[self.places] = x[self.rows]
        return full.view(self.length, self.batch, x.shape[-1])


@torch.no_grad()
def token_places(
    routing: torch.Tensor, hidden: torch.Size, groups: Groups, rows: int | None = None
) -> list[TokenPlaces]:
    """Places for every expert of the layer. Collective over tensor- and expert-parallel ranks.

    Megatron's dispatcher "allgather" gives each expert the tokens of the ranks of its tensor- and expert-parallel group
    in their order, each rank's in its own order (``megatron.core.transformer.moe.token_dispatcher``); without expert
    parallelism so does "alltoall". Under sequence parallelism those of the tensor-parallel ranks are the parts of the
    sequence; otherwise each of these sends all tokens, and only the first one's count. The samples of expert-parallel
    ranks are different ones.

    Args:
        routing: ``[s (/tp) * b, E]`` bool, this rank's routing map.
        hidden: shape ``[s (/tp), b, H]`` of the router's input.
        groups: of this process.
        rows: how many of this rank's samples count; None for all.
    """
    tensor, split, replicas = groups.layout.tensor, groups.layout.sequence_parallel, groups.layout.expert
    length, batch = hidden[0] * (tensor if split else 1), hidden[1]
    everyone, counted = routing.to(torch.uint8).contiguous(), torch.tensor([batch if rows is None else rows])
    counts = [int(counted)]
    if tensor * replicas > 1:
        parts = [torch.empty_like(everyone) for _ in range(tensor * replicas)]
        dist.all_gather(parts, everyone, group=groups.tp_ep)
        everyone = torch.cat(parts)
    if replicas > 1:
        counted = counted.to(routing.device)
        gathered = [torch.empty_like(counted) for _ in range(replicas)]
        dist.all_gather(gathered, counted, group=groups.ep)
        counts = [int(count) for count in gathered]
    # of each token in that order: its rank, its place in the sequence, and its sample
    order = torch.arange(len(everyone), device=routing.device)
    rank, within = order // len(routing), order % len(routing)
    replica, part = rank // tensor, rank % tensor
    time, sample = within // batch + (part * hidden[0] if split else 0), within % batch
    first = torch.tensor([sum(counts[:index]) for index in range(replicas)], device=routing.device)
    counts_here = torch.tensor(counts, device=routing.device)
    counting = (sample < counts_here[replica]) & (torch.ones_like(part, dtype=torch.bool) if split else part == 0)
    total = sum(counts)
    place = time * total + first[replica] + sample
    places = []
    for column in everyone.T:
        tokens = column.nonzero().flatten()
        kept = counting[tokens].nonzero().flatten()
        places.append(TokenPlaces(kept, place[tokens[kept]], length, total))
    return places
