"""Attention masks and positions of blocks that hold several documents.

``segments`` numbers the documents within a block: neighbours with the same number belong to one document, and
:data:`FILLING` marks positions without text. All
functions are elementwise over leading dimensions and work on the device of their arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

__all__ = ["FILLING", "attention_mask", "counted_labels", "document_positions", "documents_masked", "within_window"]

FILLING = -1
"""Segment number of what fills a block up."""


def attention_mask(segments: torch.Tensor) -> torch.Tensor:
    """``[..., s]`` segments -> ``[..., 1, s, s]`` bool, True where attention is not allowed (Megatron's convention).

    Block-diagonal and causal. Every row allows at least itself, so no softmax is over nothing.
    """
    length = segments.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool, device=segments.device).triu(diagonal=1)
    return ((segments[..., :, None] != segments[..., None, :]) | later)[..., None, :, :]


def document_positions(segments: torch.Tensor) -> torch.Tensor:
    """``[..., s]`` segments -> ``[..., s]`` int64 positions that restart at 0 with each document.

    Megatron's rotary embedding does not read them: it is relative, so that a mask alone makes the documents
    independent. Learned absolute embeddings do.
    """
    places = torch.arange(segments.shape[-1], device=segments.device).expand(segments.shape)
    starts = torch.zeros_like(places)
    starts[..., 1:] = places[..., 1:] * (segments[..., 1:] != segments[..., :-1])
    return places - starts.cummax(dim=-1).values


def within_window(
    mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, window: int
) -> torch.Tensor | None:
    """A mask with everything hidden, too, that lies ``window`` tokens or more before a query.

    Args:
        mask: ``[..., sq, sk]`` bool, True where attention is not allowed; None: causal.
        query, key: ``[sq, ...]`` and ``[sk, ...]``; the queries are those of the last keys.
        window: tokens that a query sees at most, its own included.

    Returns:
        ``[..., sq, sk]``; the mask itself where the window hides nothing.
    """
    count, length = len(query), len(key)
    if length <= window:
        return mask
    places = torch.arange(length, device=query.device)
    distance = places[length - count :, None] - places
    outside = distance >= window
    return (outside | (distance < 0))[None, None] if mask is None else mask | outside


def counted_labels(segments: torch.Tensor) -> torch.Tensor:
    """``[..., s + 1]`` segments -> ``[..., s]`` bool, True where a label (tokens 1 to s) is of its input's document."""
    return (segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] != FILLING)


@contextmanager
def documents_masked(chunks: Sequence[GPTModel], masked: bool = True) -> Iterator[None]:
    """Within the block the attention of a model obeys the masks that it is given.

    Megatron's own attention does so anyway. Transformer Engine's ignores a mask where the mask type is "causal", which
    it is in a decoder (``TEDotProductAttention.forward``); it takes "arbitrary" ones.

    Args:
        chunks: this rank's part of the model.
        masked: False leaves everything as it is.
    """
    from megatron.core.transformer.enums import AttnMaskType

    masks = [
        (module, module.attn_mask_type)
        for chunk in (chunks if masked else ())
        for module in chunk.modules()
        if getattr(module, "attn_mask_type", None) is AttnMaskType.causal and hasattr(module, "core_attention")
    ]
    for module, _ in masks:
        module.attn_mask_type = AttnMaskType.arbitrary
    try:
        yield
    finally:
        for module, kind in masks:
            module.attn_mask_type = kind
