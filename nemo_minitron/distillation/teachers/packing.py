"""The compact form of a cached sample: token ids as coded gaps, log-probabilities in steps of bounded error.

**Log-probabilities** are rounded to a grid (:class:`Grid`) of twice the error bound; where the probability is above
``exp(-5)``, of a quarter of that. So most bits go where the probability is. A position keeps the level of its least
likely token, and of each token how many levels it lies above that.

**Token ids** are replaced by ranks, in an order in which the shard's frequent tokens come first: the class of a token
is the bit length of its count, and equal classes are in the order of their ids. A position's ranks are sorted and kept
as gaps, in Elias' manner (Elias 1975, gamma code): the bit length of a gap is a symbol, the bits below its leading one
are kept as they are.

**Symbols** (bit lengths, levels) are coded with the Huffman codes of deflate (RFC 1951), which is in Python's standard
library. They are in the order ``[k, s]``, so that the codes adapt to the place in the sorted list. Everything else is
whole-array arithmetic of numpy; nothing is decoded token by token.

A packed sample is five little-endian uint32, the byte lengths of the first five parts, and six parts:

1. deflated: number of tokens of each position, uint32 as four planes of bytes;
2. deflated: level of each position's least likely token, likewise;
3. deflated: ``bit length - 1`` of each gap, uint8;
4. deflated: levels above the least likely, without their ``shift`` lowest bits, uint8; 255 stands for more;
5. those that are more, uint32 each;
6. of each token, packed from the lowest bit of the first byte on: the gap's bits below its leading one, and above them
   the ``shift`` lowest bits of its level.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

inflating: ModuleType = zlib
with contextlib.suppress(ImportError):  # twice as fast as zlib, of the same format
    inflating = importlib.import_module("isal.isal_zlib")

__all__ = ["Grid", "TokenOrder", "pack", "unpack"]

_KNEE = 5.0
_FINER = 4
"""Steps above ``exp(-_KNEE)`` are finer by so much."""
_MOST_LEVEL = (1 << 22) - 1
"""Levels are exact in float32 up to there."""
_COARSE = 0.125
"""Error bound from which on all bits of a level are worth coding; of finer levels the lowest bits are noise."""
_MORE = 255
_PARTS = 5
_SAMPLED = 4

Integers = npt.NDArray[np.integer]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Grid:
    """The log-probabilities that can be stored.

    Attributes:
        error_bound: largest error of a stored log-probability, in nats; a quarter of it above ``exp(-5)``. It holds
            down to a log-probability of ``-2**22`` times it.
    """

    error_bound: float

    @property
    def shift(self) -> int:
        """Number of a level's lowest bits that are stored as they are."""
        return max(0, math.floor(math.log2(_COARSE / self.error_bound)))

    @property
    def _edge(self) -> int:
        """The level where the steps change."""
        return math.ceil(_KNEE * _FINER / (2 * self.error_bound))

    def levels(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """The nearest level of each log-probability; 0 is probability one."""
        down = np.maximum(-values.astype(np.float64), 0.0)
        step = 2 * self.error_bound
        bend = self._edge * step / _FINER
        finer = np.rint(down * (_FINER / step))
        coarse = self._edge + np.rint((down - bend) / step)
        return np.minimum(np.where(down < bend, finer, coarse), _MOST_LEVEL).astype(np.int64)

    def values(self, levels: Integers) -> npt.NDArray[np.float32]:
        """The log-probability of each level."""
        step = 2 * self.error_bound
        down = levels.astype(np.float32)
        fine = down * np.float32(-step / _FINER)
        down -= np.float32(self._edge * (1 - 1 / _FINER))
        down *= np.float32(-step)
        return np.minimum(down, fine, out=down)  # both are straight lines, and the steeper one holds beyond the bend


@dataclass(frozen=True)
class TokenOrder:
    """An order of the vocabulary in which frequent tokens come first.

    Attributes:
        tokens: ``[V]`` int32, the token of each rank.
        stored: as :meth:`read` takes it; empty for the order of the ids.
    """

    tokens: npt.NDArray[np.int32]
    stored: bytes

    @classmethod
    def of(cls, samples: Sequence[npt.NDArray[np.int32]], vocab_size: int) -> TokenOrder:
        """The order that is worth storing for these samples: ``[s, k]`` token ids each, -1 where there is none."""
        counts = np.zeros(vocab_size, np.int64)
        for tokens in samples:
            counts += np.bincount(tokens[tokens >= 0], minlength=vocab_size)
        by_count = cls._sorted(_bit_length(counts).astype(np.uint8))
        by_id = cls(np.arange(vocab_size, dtype=np.int32), b"")
        some = samples[:_SAMPLED]
        share = len(samples) / len(some)
        costs = [share * sum(_gap_bits(tokens, order.ranks()) for tokens in some) for order in (by_count, by_id)]
        return by_count if costs[0] + 8 * len(by_count.stored) < costs[1] else by_id

    @classmethod
    def _sorted(cls, classes: Bytes) -> TokenOrder:
        tokens = (_MORE - classes).argsort(kind="stable").astype(np.int32)
        return cls(tokens, _deflated(classes, block=1 << 14))

    @classmethod
    def read(cls, stored: bytes, vocab_size: int) -> TokenOrder:
        """An order as it was stored.

        Raises:
            ValueError: if these are other bytes.
        """
        return _read_order(stored, vocab_size)

    def ranks(self) -> npt.NDArray[np.int64]:
        """``[V]``, the rank of each token."""
        ranks = np.empty(len(self.tokens), np.int64)
        ranks[self.tokens] = np.arange(len(self.tokens))
        return ranks


@functools.lru_cache(maxsize=16)
def _read_order(stored: bytes, vocab_size: int) -> TokenOrder:
    """A training reads the shards in any order, so the last few stay."""
    if not stored:
        return TokenOrder(np.arange(vocab_size, dtype=np.int32), b"")
    classes = _inflated(stored, vocab_size)
    return TokenOrder((_MORE - classes).argsort(kind="stable").astype(np.int32), stored)


def pack(
    tokens: npt.NDArray[np.int32], values: npt.NDArray[np.float32], ranks: npt.NDArray[np.int64], grid: Grid
) -> bytes:
    """A sample in the compact form.

    Args:
        tokens: ``[s, k]`` ids, all different in a row; -1 where there is none.
        values: ``[s, k]`` log-probabilities; what is there for -1 is not read.
        ranks: ``[V]``, as :meth:`TokenOrder.ranks` gives them.
        grid: of the log-probabilities.
    """
    k = tokens.shape[1]
    there = tokens >= 0
    counts = there.sum(1)
    sorted_ranks, order = _sorted_ranks(tokens, ranks)
    levels = np.where(there, grid.levels(np.where(there, values, 0.0)), -1)
    base = levels.max(1)
    mask = np.arange(k)[:, None] < counts
    gaps = np.diff(sorted_ranks.T, axis=0, prepend=-1)[mask]
    above = (base[:, None] - np.take_along_axis(levels, order, 1)).T[mask]
    lengths = _bit_length(gaps) - 1
    low, high = above & ((1 << grid.shift) - 1), above >> grid.shift
    block = max(1, tokens.size // 8)
    parts = [
        _deflated(_planes(counts)),
        _deflated(_planes(base)),
        _deflated(lengths.astype(np.uint8), block=block),
        _deflated(np.minimum(high, _MORE).astype(np.uint8), block=1 << 14),
        high[high >= _MORE].astype("<u4").tobytes(),
        _bits(gaps - (1 << lengths) + (low << lengths), lengths + grid.shift),
    ]
    return np.array([len(part) for part in parts[:_PARTS]], "<u4").tobytes() + b"".join(parts)


def unpack(
    packed: Bytes, order: TokenOrder, grid: Grid, *, positions: int, k: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """The tokens and log-probabilities of a packed sample, in the order of the ranks.

    Args:
        packed: as :func:`pack` made it.
        order: of the shard.
        grid: it was made with.
        positions: s.
        k: most tokens of a position.

    Returns:
        ``[s, k]`` ids and log-probabilities; -1 and minus infinity where there is none.

    Raises:
        ValueError: for bytes that :func:`pack` did not make.
    """
    sizes = packed[: 4 * _PARTS].view("<u4").astype(np.int64)
    if len(sizes) < _PARTS or 4 * _PARTS + sizes.sum() > len(packed):
        raise ValueError("it is shorter than its parts")
    parts = np.split(packed[4 * _PARTS :], sizes.cumsum())
    counts, base = (_numbers(_inflated(part, 4 * positions)) for part in parts[:2])
    if counts.size and not (counts.min() >= 1 and counts.max() <= k):
        raise ValueError(f"a position has {counts.min()} to {counts.max()} tokens of {k}")
    total = int(counts.sum())
    lengths = _inflated(parts[2], total)
    if total and int(lengths.max()) >= len(order.tokens).bit_length():
        raise ValueError("a gap is longer than the vocabulary")
    gaps, low = _read_bits(parts[5], lengths, grid.shift)
    above: npt.NDArray[Any] = _inflated(parts[3], total)
    more, marked = parts[4].view("<u4"), np.flatnonzero(above == _MORE)
    if marked.size != more.size:
        raise ValueError("the number of large levels is wrong")
    if more.size or grid.shift:
        above = above.astype(np.int32)
        above[marked] = more
        above <<= grid.shift
        above += low
    mask = None if total == k * positions else np.arange(k)[:, None] < counts
    values = grid.values(base - _table(above, mask, k, positions))
    # Gaps are above 0, so the last rank of a position is its largest.
    ranks = _table(gaps, mask, k, positions)
    ranks[0] -= 1
    ranks = ranks.cumsum(0, dtype=np.int32 if 2 * k * len(order.tokens) < 1 << 31 else np.int64)
    if total and int(ranks[-1].max()) >= len(order.tokens):
        raise ValueError("a token is out of range")
    tokens = order.tokens.take(ranks)
    if mask is not None:
        tokens = np.where(mask, tokens, np.int32(-1))
        values = np.where(mask, values, np.float32("-inf"))
    return tokens.T, values.T


def _sorted_ranks(
    tokens: npt.NDArray[np.int32], ranks: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """``[s, k]`` ascending ranks, those of absent tokens last, and the columns that they come from."""
    own = np.where(tokens >= 0, ranks[tokens], len(ranks))
    order = own.argsort(1, kind="stable")
    return np.take_along_axis(own, order, 1), order


def _gap_bits(tokens: npt.NDArray[np.int32], ranks: npt.NDArray[np.int64]) -> float:
    """Bits of the gaps of a sample below their leading ones."""
    own, _ = _sorted_ranks(tokens, ranks)
    gaps = np.diff(own, axis=1, prepend=-1)[own < len(ranks)]
    return float((_bit_length(gaps) - 1).sum())


def _bit_length(numbers: Integers) -> npt.NDArray[np.int64]:
    """0 for 0; exact below ``2**53``."""
    return np.frexp(numbers.astype(np.float64))[1].astype(np.int64)


def _planes(numbers: Integers) -> Bytes:
    """uint32 numbers as four planes of bytes, of which the high ones are nearly empty."""
    return np.ascontiguousarray(numbers.astype("<u4").view(np.uint8).reshape(-1, 4).T)


def _numbers(planes: Bytes) -> npt.NDArray[np.int32]:
    return np.ascontiguousarray(planes.reshape(4, -1).T).view("<u4")[:, 0].astype(np.int32)


def _deflated(symbols: Bytes, *, block: int | None = None) -> bytes:
    """Deflated bytes; with ``block`` by Huffman codes alone, new ones after about so many symbols."""
    memory, strategy = 8, zlib.Z_DEFAULT_STRATEGY
    if block is not None:
        # zlib begins a new block, with codes of its own, after 2**(memory + 6) symbols.
        memory, strategy = min(9, max(1, block.bit_length() - 7)), zlib.Z_HUFFMAN_ONLY
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, memory, strategy)
    return coder.compress(symbols.tobytes()) + coder.flush()


def _inflated(data: Bytes | bytes, size: int) -> Bytes:
    """``size`` bytes; no more are made of whatever is given.

    Raises:
        ValueError: if it holds fewer.
    """
    if not size:
        return np.empty(0, np.uint8)
    try:
        found = inflating.decompressobj(-15).decompress(data, size)
    except (zlib.error, inflating.error) as error:
        raise ValueError(f"it cannot be inflated ({error})") from error
    if len(found) != size:
        raise ValueError(f"it inflates to {len(found)} bytes, not {size}")
    return np.frombuffer(found, np.uint8)


def _bits(numbers: Integers, widths: Integers) -> bytes:
    """The numbers one after another, each in its number of bits, from the lowest bit of the first byte on."""
    ends = widths.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    place = np.arange(total) - np.repeat(ends - widths, widths)
    return np.packbits(((np.repeat(numbers, widths) >> place) & 1).astype(np.uint8), bitorder="little").tobytes()


def _read_bits(packed: Bytes, lengths: Bytes, shift: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32] | int]:
    """Gaps of these bit lengths (less one), and the ``shift`` bits that stand above each of them."""
    longest = int(lengths.max()) if len(lengths) else 0
    ends = np.cumsum(lengths + np.uint8(shift), dtype=np.int64)
    if len(ends) and int(ends[-1]) > 8 * len(packed):
        raise ValueError("its bits are too few")
    starts = ends - lengths
    starts -= shift
    # A window of whole bytes that begins at any byte holds the bits from any place in that byte on.
    wide = np.dtype("<u4" if longest + shift + 7 <= 32 else "<u8")
    padded = np.concatenate([packed, np.zeros(8, np.uint8)])
    windows: npt.NDArray[Any] = np.ndarray((len(packed) + 1,), wide, padded, strides=(1,))
    word = windows.take(starts >> 3)  # many times as fast as an index, which takes unaligned numbers one by one
    starts &= 7
    word >>= starts.astype(wide)
    leading = np.left_shift(wide.type(1), lengths, dtype=wide)
    low: npt.NDArray[np.int32] | int = 0
    if shift:
        low = ((word >> lengths) & wide.type((1 << shift) - 1)).astype(np.int32)
    word &= leading - wide.type(1)
    word |= leading
    return word.astype(np.int32), low


def _table(numbers: Integers, mask: npt.NDArray[np.bool_] | None, k: int, positions: int) -> Integers:
    """``[k, s]``, with zeros where the mask has nothing."""
    if mask is None:
        return numbers.reshape(k, positions)
    table = np.zeros((k, positions), numbers.dtype)
    table[mask] = numbers
    return table
