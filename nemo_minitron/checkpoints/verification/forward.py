"""A forward pass over a Megatron-core model, as the loaders need it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["model_logits"]


def model_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """``[rows, s, V]`` float32 logits of a Megatron-core ``GPTModel`` for ``[rows, s]`` tokens, one row at a time."""
    import torch

    positions = torch.arange(ids.shape[1])[None]
    # True hides
    mask = torch.triu(torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool), diagonal=1)[None, None]
    return torch.cat([model(row[None], positions, mask).float() for row in ids])
