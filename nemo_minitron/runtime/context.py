"""Context parallelism: which tokens of a sequence a rank has.

As in Megatron (``megatron.core.utils.get_batch_on_this_cp_rank``), a sequence is cut into ``2 cp`` runs of tokens, and
rank r has runs r and ``2 cp - 1 - r``: under a causal mask each rank has the same work. Megatron itself cuts RoPE's
tables so.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from nemo_minitron.errors import ShapeError
from nemo_minitron.runtime.groups import Groups

__all__ = ["rank_batch", "rank_part", "rank_runs", "whole_sequence"]

_SEQUENCE = {"tokens": 1, "labels": 1, "loss_mask": 1, "position_ids": 1, "attention_mask": 2}
"""Where the sequence lies in what a batch holds; of a mask ``[b or 1, 1, s, s]`` it is that of the queries."""


def rank_runs(rank: int, context: int) -> tuple[int, int]:
    """The two runs of tokens, of ``2 context``, that a context-parallel rank has."""
    return rank, 2 * context - 1 - rank


def rank_part(tensor: torch.Tensor, groups: Groups, *, dim: int) -> torch.Tensor:
    """This rank's tokens, ``s / cp`` of ``s`` along ``dim``.

    Raises:
        ShapeError: if ``s`` is no multiple of ``2 cp``.
    """
    context = groups.layout.context
    if context == 1:
        return tensor
    if (length := tensor.shape[dim]) % (2 * context):
        raise ShapeError(
            f"a sequence of {length} tokens cannot be split over parallel.context={context}; use a multiple of "
            f"{2 * context}"
        )
    runs = tensor.chunk(2 * context, dim)
    return torch.cat([runs[run] for run in rank_runs(groups.cp_rank, context)], dim)


def rank_batch(batch: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """A batch with this rank's tokens, labels, masks and positions; all other entries stay as they are.

    An attention mask ``[b or 1, 1, s, s]`` becomes ``[b or 1, 1, s / cp, s]``: this rank's queries, all keys.
    """
    return {
        name: rank_part(value, groups, dim=_SEQUENCE[name]) if name in _SEQUENCE else value
        for name, value in batch.items()
    }


def whole_sequence(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """``[s / cp, ...]`` of each rank -> ``[s, ...]`` on all, in the order of the sequence.

    Backward: each rank gets the sum of all ranks' gradients of its own tokens (a reduce-scatter).

    Args:
        part: as :func:`rank_part` gives it.
        group: context-parallel.
    """
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    context = dist.get_world_size(group)
    gathered = gather_from_sequence_parallel_region(part, tensor_parallel_output_grad=True, group=group)
    runs = gathered.chunk(2 * context)
    held = [run for rank in range(context) for run in rank_runs(rank, context)]
    return torch.cat([runs[held.index(run)] for run in range(2 * context)])
