"""Documents of a packed block in a form that is cheap to send and to hash: the start of each token's document.

A batch gives them by position ids that begin again with each document, blocks by the numbers of their segments.
"""

from __future__ import annotations

import torch

from nemo_minitron.data.blocks import Blocks
from nemo_minitron.runtime.masks import attention_mask, document_positions

__all__ = ["block_starts", "model_inputs", "starts_of_positions"]


def starts_of_positions(positions: torch.Tensor) -> torch.Tensor:
    """``[..., s]`` position ids, which begin again at 0 with each document -> ``[..., s]`` int32 starts."""
    return (torch.arange(positions.shape[-1], device=positions.device) - positions).to(torch.int32)


def block_starts(blocks: torch.Tensor | Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """Token blocks -> ``[n, s]`` input tokens, and ``[n, s]`` the position where each token's document starts."""
    blocks = Blocks.of(blocks)
    tokens = blocks.tokens[:, :-1]
    if blocks.segments is None:
        return tokens, torch.zeros_like(tokens, dtype=torch.int32)
    return tokens, starts_of_positions(document_positions(blocks.segments[:, :-1]))


def model_inputs(tokens: torch.Tensor, starts: torch.Tensor) -> dict[str, torch.Tensor]:
    """The batch that a Megatron model reads for ``[b, s]`` tokens, without labels.

    ``attention_mask`` is ``[b, 1, s, s]``, or ``[1, 1, s, s]`` where no block has two documents.
    """
    return {
        "tokens": tokens.to(torch.int64),
        "position_ids": torch.arange(tokens.shape[-1], device=tokens.device) - starts,
        # equal within a document and different between two, starts number the documents as well as any segments
        "attention_mask": attention_mask(starts if starts.any() else starts[:1]),
    }
