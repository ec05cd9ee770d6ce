"""Pack documents of given lengths into blocks of one length. Only lengths are used; no token is read.

A block is a sequence of pieces, each a part of one document; what they leave free at the end is padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Packing", "best_fit", "best_fit_begun", "stream", "stream_begun"]


@dataclass(frozen=True)
class Packing:
    """Which parts of which documents make up each block.

    Attributes:
        document, start, length: ``[p]`` int64. Piece ``i`` is the tokens ``start[i]`` to ``start[i] + length[i]`` of
            document ``document[i]``; at least one token.
        first: ``[n + 1]`` int64: the pieces of block ``i`` are ``first[i]`` to ``first[i + 1]``.
        size: tokens of a block.
        begun: ``[p]`` bool: a first token comes before the piece, and takes a place; None for none.
    """

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    first: np.ndarray
    size: int
    begun: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def tokens(self) -> int:
        """Number of tokens in all blocks, without padding."""
        return int(self.places().sum())

    def places(self) -> np.ndarray:
        """``[p]`` int64: places of each piece in its block."""
        return self.length if self.begun is None else self.length + self.begun

    def labels(self) -> np.ndarray:
        """``[n]`` int64: labels of each block that belong to their input's document (places of a piece - 1)."""
        total = np.concatenate([[0], np.cumsum(self.places() - 1)])
        return total[self.first[1:]] - total[self.first[:-1]]

    def take(self, blocks: np.ndarray) -> Packing:
        """These blocks, in this order."""
        counts = self.first[blocks + 1] - self.first[blocks]
        first = np.concatenate([[0], np.cumsum(counts)])
        pieces = np.repeat(self.first[blocks] - first[:-1], counts) + np.arange(first[-1])
        begun = None if self.begun is None else self.begun[pieces]
        return Packing(self.document[pieces], self.start[pieces], self.length[pieces], first, self.size, begun)


def stream(lengths: np.ndarray, size: int) -> Packing:
    """Documents one after the other, cut wherever a block ends. The tail that fills no block is dropped.

    Every other token is in exactly one block, in order; no block has padding.

    Args:
        lengths: ``[d]`` tokens of each document, above 0.
        size: tokens of a block.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    begins = ends - lengths
    blocks = int(ends[-1]) // size if len(ends) else 0
    cuts = np.arange(blocks + 1, dtype=np.int64) * size
    edges = np.union1d(begins, cuts)
    edges = edges[edges <= blocks * size]
    start = edges[:-1]
    document = np.searchsorted(ends, start, side="right")
    return Packing(
        document=document.astype(np.int64),
        start=start - begins[document] if len(start) else start,
        length=np.diff(edges),
        first=np.searchsorted(start, cuts) if blocks else np.zeros(1, dtype=np.int64),
        size=size,
    )


def best_fit(lengths: np.ndarray, size: int) -> Packing:
    """Whole documents, the longest first, each into the block where it leaves the least free space.

    Best-fit decreasing, as arXiv 2404.10830 (section 3) packs pre-training text: a document is cut only where it is
    longer than a block, into full blocks and a last part that is packed like a document. Every token is in exactly one
    block. Time ``O(d size / 64)``: the free space of all blocks is one bit set.

    Args:
        lengths: ``[d]`` tokens of each document, above 0.
        size: tokens of a block.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    whole = lengths // size
    cut = np.repeat(np.arange(len(lengths)), whole)
    nth = np.arange(len(cut)) - np.repeat(np.cumsum(whole) - whole, whole)
    remainders = np.nonzero(lengths % size)[0]
    remainders = remainders[np.argsort(-(lengths[remainders] % size), kind="stable")]
    document = np.concatenate([cut, remainders])
    start = np.concatenate([nth * size, whole[remainders] * size])
    length = np.concatenate([np.full(len(cut), size, dtype=np.int64), lengths[remainders] % size])

    block = np.arange(len(document))
    blocks = len(cut)
    free: list[list[int]] = [[] for _ in range(size)]  # blocks by the space that they have left
    spaces = 0  # bit r: there is a block with r left
    for place, needed in enumerate(length[len(cut) :].tolist(), len(cut)):
        fitting = spaces >> needed
        if fitting:
            space = needed + (fitting & -fitting).bit_length() - 1
            chosen = free[space].pop()
            if not free[space]:
                spaces ^= 1 << space
        else:
            space, chosen, blocks = size, blocks, blocks + 1
        block[place] = chosen
        if space > needed:
            free[space - needed].append(chosen)
            spaces |= 1 << (space - needed)
    order = np.argsort(block, kind="stable")
    first = np.searchsorted(block[order], np.arange(blocks + 1))
    return Packing(document[order], start[order], length[order], first, size)


def stream_begun(lengths: np.ndarray, size: int) -> Packing:
    """:func:`stream` with a first token before each piece that does not begin its document; ``size`` is above 1."""
    rows: list[tuple[int, int, int]] = []
    first, room, whole = [0], size, 0
    for document, length in enumerate(np.asarray(lengths).tolist()):
        start = 0
        while start < length:
            count = min(length - start, room - (start > 0))
            rows.append((document, start, count))
            room -= count + (start > 0)
            start += count
            if room == 0:
                first.append(len(rows))
                room, whole = size, len(rows)
    table = np.array(rows[:whole], dtype=np.int64).reshape(whole, 3)
    document, start, count = table.T
    return Packing(document, start, count, np.array(first, dtype=np.int64), size, start > 0)


def best_fit_begun(lengths: np.ndarray, size: int) -> Packing:
    """:func:`best_fit` with a first token before each piece that does not begin its document; ``size`` is above 1."""
    lengths = np.asarray(lengths, dtype=np.int64)
    further = -(-np.maximum(lengths - size, 0) // (size - 1))
    document = np.repeat(np.arange(len(lengths)), 1 + further)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(1 + further) - (1 + further), 1 + further)
    begun = nth > 0
    start = np.where(begun, size + (nth - 1) * (size - 1), 0)
    length = np.minimum(lengths[document] - start, np.where(begun, size - 1, size))
    packed = best_fit(length + begun, size)
    parts = packed.document  # of each piece, which best_fit has no need to cut
    return Packing(document[parts], start[parts], length[parts], packed.first, size, begun[parts])
