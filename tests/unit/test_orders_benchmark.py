"""The statistics of ``benchmarks/orders.py``: intervals of paired differences, and what they say of a claim."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the module sets it where it is not
    import orders

    return orders


@pytest.fixture(autouse=True)
def forgotten() -> Any:
    """Modules of the benchmarks have common names."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def test_an_interval_is_that_of_the_seeds_means_or_of_the_blocks(orders: ModuleType) -> None:
    # By hand: means 1, 2, 3; their standard error 1 / sqrt(3); t(0.975, 2) = 4.30265.
    centre, low, high = orders.interval([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    assert (centre, high - centre, centre - low) == pytest.approx((2.0, 4.302653 / 3**0.5, 4.302653 / 3**0.5), rel=1e-6)
    # Seeds that agree: what remains is the blocks' error, sqrt(2 * 0.5 / 2) / 2.
    centre, low, high = orders.interval([[0.5, 1.5], [0.5, 1.5]])
    assert (centre, high - centre) == pytest.approx((1.0, 12.706205 * 0.5**0.5 / 2), rel=1e-6)
    # One seed: its blocks alone, with their own degrees of freedom; one number says nothing of its error.
    centre, low, high = orders.interval([[1.0, 2.0, 3.0]])
    assert (centre, high - centre) == pytest.approx((2.0, 4.302653 / 3**0.5), rel=1e-6)
    assert orders.interval([[1.0]])[1:] == (-math.inf, math.inf)


def test_an_interval_covers_the_difference_as_often_as_it_says(orders: ModuleType) -> None:
    draws = np.random.default_rng(0)
    for between in (0.0, 1.0):
        covered = 0
        for _ in range(400):
            means = draws.normal(0.3, between, size=3)
            rows = draws.normal(means[:, None], 2.0, size=(3, 16)).tolist()
            _, low, high = orders.interval(rows)
            covered += low <= 0.3 <= high
        assert covered / 400 >= 0.93  # more is caution: the larger of two errors counts


def test_verdicts_and_pairs(orders: ModuleType) -> None:
    verdicts = [orders.verdict(*bounds) for bounds in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1), (-math.inf, math.inf))]
    assert verdicts == ["shows", "does not show", "cannot be told", "cannot be told"]
    assert orders.paired([[3.0, 4.0], None, [1.0]], [[1.0, 1.0], [1.0], [2.0]]) == [[2.0, 3.0], [-1.0]]
    with pytest.raises(ValueError, match="shorter"):
        orders.paired([[1.0, 2.0]], [[1.0]])
