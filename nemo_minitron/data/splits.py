"""Which document belongs to which split: train, calibration or held-out."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np

from nemo_minitron.config import DataConfig

__all__ = ["SPLITS", "DocumentTable", "deal", "order_key", "seen_in"]

SPLITS = ("train", "calibration", "held_out")


class DocumentTable(NamedTuple):
    """Lengths, sizes and order keys of the documents of a source, without their tokens.

    Attributes:
        lengths: ``[d]`` int64, number of tokens, EOS included.
        sizes: ``[d]`` int64, the unit of the splits' shares: characters, or tokens where there is no text.
        keys: ``[d, 32]`` uint8, :func:`order_key` of each.
    """

    lengths: np.ndarray
    sizes: np.ndarray
    keys: np.ndarray


def order_key(seed: int, text: str) -> bytes:
    """Sort key of a document in the order in which the splits are filled, whatever file it is in."""
    return hashlib.sha256(f"{seed}\0{text}".encode()).digest()


def deal(table: DocumentTable, config: DataConfig) -> dict[str, np.ndarray]:
    """Distribute one source's documents to the splits: their numbers, in order. Each goes to exactly one split.

    A split's share is of the characters, and is exceeded by one document at most. A document longer than a whole
    split's share goes to training, so that few long documents do not distort the shares; a split that would stay
    empty gets the shortest document of the split with the most documents.
    """
    columns = table.keys.view(">u8")
    order = np.lexsort(tuple(columns[:, place] for place in (3, 2, 1, 0)))
    total = int(table.sizes.sum())
    shares = {"held_out": config.held_out_fraction * total, "calibration": config.calibration_fraction * total}
    places = np.full(len(order), SPLITS.index("train"))
    filled = dict.fromkeys(shares, 0)
    for at, document in enumerate(order):
        if all(filled[split] >= share for split, share in shares.items()):
            break
        size = int(table.sizes[document])
        for split, share in shares.items():
            if filled[split] < share and size <= share:
                places[at] = SPLITS.index(split)
                filled[split] += size
                break
    parts = {split: order[places == number] for number, split in enumerate(SPLITS)}
    for split in (*shares, "train"):
        donor = max(SPLITS, key=lambda name: len(parts[name]))
        if not len(parts[split]) and len(parts[donor]) > 1:
            shortest = int(np.argmin(table.sizes[parts[donor]]))
            parts[split] = parts[donor][shortest : shortest + 1]
            parts[donor] = np.delete(parts[donor], shortest)
    return parts


def seen_in(keys: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """``[d]`` bool: documents whose ``[d, 32]`` key is among those of other sources."""
    seen = np.zeros(len(keys), dtype=bool)
    for other in others:
        near = np.nonzero(np.isin(keys[:, :8].copy().view("u8")[:, 0], other[:, :8].copy().view("u8")[:, 0]))[0]
        if len(near):  # nearly always the very same: look at the whole key
            near_keys = keys[near].copy().view("u8")[:, 0]
            rows = np.nonzero(np.isin(other[:, :8].copy().view("u8")[:, 0], near_keys))[0]
            known = {other[row].tobytes() for row in rows}
            seen[near] |= np.array([keys[row].tobytes() in known for row in near])
    return seen
