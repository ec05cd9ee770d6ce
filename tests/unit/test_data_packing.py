"""Properties of packing, for documents of any lengths and blocks of any size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_minitron.data.packing import Packing, best_fit, best_fit_begun, stream, stream_begun

LENGTHS = st.lists(st.integers(1, 40), max_size=60).map(lambda x: np.array(x, dtype=np.int64))
SIZES = st.integers(1, 24)


def pieces(packing: Packing) -> list[list[tuple[int, int, int]]]:
    every = list(zip(packing.document.tolist(), packing.start.tolist(), packing.length.tolist(), strict=True))
    return [every[first:past] for first, past in zip(packing.first[:-1], packing.first[1:], strict=True)]


def tokens(packing: Packing) -> list[tuple[int, int]]:
    """Every ``(document, place in it)``, in order."""
    return [(d, place) for block in pieces(packing) for d, start, n in block for place in range(start, start + n)]


@settings(deadline=None)
@given(LENGTHS, SIZES)
def test_stream_keeps_all_but_the_tail_in_order(lengths: np.ndarray, size: int) -> None:
    packing = stream(lengths, size)
    everything = [(d, place) for d, n in enumerate(lengths) for place in range(n)]
    assert tokens(packing) == everything[: len(everything) // size * size]
    assert all(sum(n for *_, n in block) == size for block in pieces(packing))
    assert len(packing) == len(everything) // size


@settings(deadline=None)
@given(LENGTHS, SIZES)
def test_best_fit_keeps_everything_and_cuts_no_document_without_need(lengths: np.ndarray, size: int) -> None:
    packing = best_fit(lengths, size)
    assert sorted(tokens(packing)) == [(d, place) for d, n in enumerate(lengths) for place in range(n)]
    assert packing.tokens == lengths.sum()
    blocks = pieces(packing)
    assert all(block and sum(n for *_, n in block) <= size for block in blocks)
    count = np.bincount(packing.document, minlength=len(lengths))
    assert (count == -(-lengths // size)).all()
    # No two blocks could be one: each was opened because nothing before it had room.
    filled = sorted(sum(n for *_, n in block) for block in blocks)
    assert len(filled) < 2 or filled[0] + filled[1] > size


@settings(deadline=None)
@given(LENGTHS, SIZES, st.randoms(use_true_random=False))
def test_labels_and_choices_of_blocks(lengths: np.ndarray, size: int, random: object) -> None:
    for packing in (stream(lengths, size), best_fit(lengths, size)):
        blocks = pieces(packing)
        assert packing.labels().tolist() == [sum(n - 1 for *_, n in block) for block in blocks]
        order = list(range(len(blocks)))
        random.shuffle(order)  # type: ignore[attr-defined]
        chosen = packing.take(np.array(order[: len(order) // 2], dtype=np.int64))
        assert pieces(chosen) == [blocks[number] for number in order[: len(order) // 2]]


def test_best_fit_leaves_the_least_room() -> None:
    packing = best_fit(np.array([3, 6, 2, 7, 12, 1]), 10)
    assert pieces(packing) == [[(4, 0, 10)], [(3, 0, 7), (0, 0, 3)], [(1, 0, 6), (2, 0, 2), (4, 10, 2)], [(5, 0, 1)]]


@pytest.mark.parametrize("pack", [stream, best_fit])
def test_no_documents(pack) -> None:
    assert len(pack(np.array([], dtype=np.int64), 4)) == 0


@settings(deadline=None)
@given(LENGTHS, st.integers(2, 24))
def test_pieces_that_begin_with_the_first_token(lengths: np.ndarray, size: int) -> None:
    """Those that do not begin their document, and only those; nothing is lost but the tail of a stream."""
    everything = [(d, place) for d, n in enumerate(lengths) for place in range(n)]
    for packing in (stream_begun(lengths, size), best_fit_begun(lengths, size)):
        assert packing.begun is not None
        assert (packing.begun == (packing.start > 0)).all()
        filled = [
            sum(packing.places()[first:past]) for first, past in zip(packing.first, packing.first[1:], strict=False)
        ]
        assert all(0 < places <= size for places in filled)
        assert packing.tokens == sum(filled)
        counts = np.add.reduceat(packing.places() - 1, packing.first[:-1]) if len(packing) else []
        assert packing.labels().tolist() == list(counts)
        half = np.arange(len(packing))[::2]
        chosen = packing.take(half)
        assert pieces(chosen) == [pieces(packing)[block] for block in half]
        assert chosen.begun is not None
        assert (chosen.begun == (chosen.start > 0)).all()
    flow, fitted = stream_begun(lengths, size), best_fit_begun(lengths, size)
    assert tokens(flow) == everything[: len(tokens(flow))]
    left = len(everything) - len(tokens(flow))
    assert left < size
    assert all(sum(flow.places()[a:b]) == size for a, b in zip(flow.first, flow.first[1:], strict=False))
    assert sorted(tokens(fitted)) == everything
    whole = lengths <= size
    assert (np.bincount(fitted.document, minlength=len(lengths))[whole] == 1).all()
