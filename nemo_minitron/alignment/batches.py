"""Conversations as the batches that Aligner's supervised models take: one per row, or several packed into a row.

Aligner's own chat dataset knows one form of template (a header that says ``System``, the roles' names as they stand in
the data) and cannot pack; its packed dataset separates the conversations by Transformer Engine's attention alone. Here
the tokens come from any template, and packed conversations are separated by the attention mask, which every attention
of Megatron's honours. ``tests/unit/test_alignment_batches.py`` holds tokens and loss masks against Aligner's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from nemo_minitron.runtime.masks import FILLING, attention_mask

__all__ = ["Sample", "collate", "pack"]


class Sample(NamedTuple):
    """Tokens of one conversation, or of several in a row.

    Attributes:
        ids: ``[n]`` tokens.
        trained: ``[n]`` bool: the loss is taken of this token.
        lengths: tokens of each conversation in it, in order; they add up to ``n``.
    """

    ids: list[int]
    trained: list[bool]
    lengths: tuple[int, ...]


def pack(samples: Sequence[Sample], max_length: int) -> list[Sample]:
    """Put conversations together until none fits any more: each, from the longest, where the least room is left (best
    fit decreasing).

    Args:
        samples: each of at most ``max_length + 1`` tokens.
        max_length: inputs of a row. A conversation of ``n`` tokens takes ``n - 1``: its last token is a label alone.
    """
    rows: list[list[Sample]] = []
    room: list[int] = []
    for sample in sorted(samples, key=lambda sample: -len(sample.ids)):
        need = len(sample.ids) - len(sample.lengths)
        fitting = [row for row, left in enumerate(room) if left >= need]
        if fitting:
            row = min(fitting, key=room.__getitem__)
            rows[row].append(sample)
            room[row] -= need
        else:
            rows.append([sample])
            room.append(max_length - need)
    return [
        Sample(
            [token for sample in row for token in sample.ids],
            [flag for sample in row for flag in sample.trained],
            tuple(length for sample in row for length in sample.lengths),
        )
        for row in rows
    ]


def collate(multiple: int, *, masked: bool) -> Callable[[list[Sample]], dict[str, torch.Tensor]]:
    """A function from samples to the batch that ``GPTSFTModel`` takes.

    Args:
        multiple: rows are padded to a length that is a multiple of this.
        masked: give an attention mask that separates the conversations of a row; without it, attention is causal.

    Returns:
        A function that returns ``tokens``, ``labels``, ``loss_mask``, ``position_ids`` ``[b, s]`` and, if masked,
        ``attention_mask`` ``[b, 1, s, s]``, True where attention is not allowed. Padding follows the tokens and has no
        loss.
    """
    return partial(_collate, multiple=multiple, masked=masked)


def _collate(batch: list[Sample], *, multiple: int, masked: bool) -> dict[str, torch.Tensor]:
    longest = max(len(sample.ids) - len(sample.lengths) for sample in batch)
    size = (len(batch), -(-longest // multiple) * multiple)
    tokens, labels, positions = (torch.zeros(size, dtype=torch.long) for _ in range(3))
    loss_mask = torch.zeros(size)
    segments = torch.full(size, FILLING)
    for row, sample in enumerate(batch):
        at = first = 0
        for number, length in enumerate(sample.lengths):
            ids = torch.tensor(sample.ids[first : first + length])
            here = slice(at, at + length - 1)
            tokens[row, here], labels[row, here] = ids[:-1], ids[1:]
            loss_mask[row, here] = torch.tensor(sample.trained[first + 1 : first + length], dtype=torch.float)
            positions[row, here] = torch.arange(length - 1)
            segments[row, here] = number
            at, first = at + length - 1, first + length
    collated = {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, "position_ids": positions}
    if masked:
        collated["attention_mask"] = attention_mask(segments)
    return collated
