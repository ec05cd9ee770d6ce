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
        length, batch: ``s`` and ``b`` of the micro-batch; ``s`` is the whole sequence.
    """

    rows: torch.Tensor
    places: torch.Tensor
    length: int
    batch: int

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """``[tokens, units]`` of the expert -> ``[s, b, units]``, zero where a token went to other experts."""
        full = x.new_zeros(self.length * self.batch, x.shape[-1])
        full[self.places] = x[self.rows]
        return full.view(self.length, self.batch, -1)


@torch.no_grad()
def token_places(routing: torch.Tensor, hidden: torch.Size, groups: Groups) -> list[TokenPlaces]:
    """Places for every expert.

    Both of Megatron's dispatchers ("allgather", "alltoall"), without expert parallelism, give each expert the tokens
    of tensor-parallel rank 0, then 1, ..., each in its own order (``megatron.core.transformer.moe.token_dispatcher``).
    Under sequence parallelism these are the parts of the sequence; otherwise every rank sends all tokens, and only
    the first rank's count.

    Args:
        routing: ``[s (/tp) * b, E]`` bool, this rank's routing map.
        hidden: shape ``[s (/tp), b, H]`` of the router's input.
        groups: of this process.
    """
    tensor, split = groups.layout.tensor, groups.layout.sequence_parallel
    length, batch = hidden[0] * (tensor if split else 1), hidden[1]
    everyone = routing.to(torch.uint8).contiguous()
    if tensor > 1:
        parts = [torch.empty_like(everyone) for _ in range(tensor)]
        dist.all_gather(parts, everyone, group=groups.tp)
        everyone = torch.cat(parts)
    places = []
    for column in everyone.T:
        tokens = column.nonzero().flatten()
        rows = (tokens < length * batch).nonzero().flatten()
        places.append(TokenPlaces(rows, tokens[rows], length, batch))
    return places
