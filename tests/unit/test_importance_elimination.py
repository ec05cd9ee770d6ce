"""Losses after elimination, against the least-squares problem that they are defined by, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_minitron.importance import elimination
from nemo_minitron.importance.elimination import eliminate

TOLERANCE = 1e-8


def problem(k: int, m: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``[tokens, k]`` inputs that depend on each other, and an ``[m, k]`` matrix."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=generator, dtype=torch.float64)
    mix = torch.randn(k, k, generator=generator, dtype=torch.float64)
    return x @ mix, torch.randn(m, k, generator=generator, dtype=torch.float64)


def loss(x: torch.Tensor, weight: torch.Tensor, removed: list[int], ridge: float) -> float:
    """The definition: rows of a least-squares problem for the tokens, and one row a kept input for its ridge."""
    level = ridge * x.square().sum(0).mean()
    kept = [index for index in range(x.shape[1]) if index not in removed]
    penalty = level.sqrt() * torch.eye(len(kept), dtype=x.dtype)
    rows = torch.cat([x[:, kept], penalty])
    targets = torch.cat([x @ weight.T, penalty @ weight[:, kept].T])
    solved = torch.linalg.lstsq(rows, targets).solution if kept else torch.zeros(0, len(weight), dtype=x.dtype)
    return float((rows @ solved - targets).square().sum() / (x @ weight.T).square().sum())


def sums(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.T @ x, weight.T @ weight


@settings(max_examples=25, deadline=None)
@given(
    k=st.integers(2, 9), m=st.integers(1, 4), tokens=st.integers(3, 30), seed=st.integers(0, 99),
    ridge=st.sampled_from([1.0, 0.1, 1e-3]), panel=st.integers(1, 4),
)  # fmt: skip
def test_inputs_go_in_the_greedy_order(k: int, m: int, tokens: int, seed: int, ridge: float, panel: int) -> None:
    """Each step is the cheapest by trying all; panels of the factorisation change nothing."""
    x, weight = problem(k, m, tokens, seed)
    gram, outer = sums(x, weight)
    level = ridge * gram.diagonal().mean()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elimination, "_PANEL", panel)
        order, steps = elimination._single(elimination._inverse(gram, level), outer, level)
        found = eliminate(gram, outer, ridge=ridge)
    assert sorted(order.tolist()) == list(range(k))
    total = float((gram * outer).sum())
    most, removed = 0.0, []
    for unit, now in zip(order.tolist(), (steps.cumsum(0) / total).tolist(), strict=True):
        costs = {index: loss(x, weight, [*removed, index], ridge) for index in range(k) if index not in removed}
        assert costs[unit] <= min(costs.values()) + TOLERANCE
        assert now == pytest.approx(costs[unit], rel=1e-6, abs=TOLERANCE)
        removed.append(unit)
        most = max(most, now)
        assert float(found[unit]) == pytest.approx(most, rel=1e-9, abs=1e-12)


@settings(max_examples=15, deadline=None)
@given(groups=st.integers(1, 3), per_group=st.integers(1, 3), width=st.integers(1, 3), seed=st.integers(0, 99))
def test_units_of_several_inputs_go_from_all_groups_evenly(groups: int, per_group: int, width: int, seed: int) -> None:
    units = groups * per_group
    x, weight = problem(units * width, 3, 40, seed)
    found = eliminate(*sums(x, weight), width, per_group=per_group, ridge=0.01)
    order = found.argsort(stable=True).tolist()
    most = 0.0

    def inputs(chosen: list[int]) -> list[int]:
        return [unit * width + place for unit in chosen for place in range(width)]

    assert len(order) == units
    for count in range(1, units + 1):
        taken = [sum(unit // per_group == group for unit in order[:count]) for group in range(groups)]
        assert max(taken) - min(taken) <= 1
        most = max(most, loss(x, weight, inputs(order[:count]), 0.01))
        assert float(found[order[count - 1]]) == pytest.approx(most, rel=1e-6, abs=TOLERANCE)


def test_a_combination_of_others_costs_nothing_however_large_it_is() -> None:
    x, weight = problem(12, 5, 60, 1)
    x[:, 4] = 50 * x[:, 1] - 30 * x[:, 7]
    gram, outer = sums(x, weight)
    assert x.abs().mean(0).argmax() == 4
    assert loss(x, weight, [4], 1e-9) < 1e-6
    found = eliminate(gram, outer, ridge=1e-9)
    # Each of the three is a combination of the other two; after one of them, nothing more is free.
    assert found.argmin() in (1, 4, 7)
    assert float(found.min()) < 1e-6
    assert float(found.sort().values[1]) > 1e-6


def test_of_two_that_replace_each_other_one_stays() -> None:
    """Alone each would cost nothing."""
    x, weight = problem(8, 5, 40, 2)
    x[:, 3] = x[:, 6]
    gram, outer = sums(x, weight)
    assert max(loss(x, weight, [index], 1e-9) for index in (3, 6)) < 1e-6
    found = eliminate(gram, outer, ridge=1e-9)
    assert float(found[[3, 6]].min()) < 1e-6
    assert float(found[[3, 6]].max()) > 1e-2


def test_what_is_never_active_costs_nothing() -> None:
    x, weight = problem(6, 3, 40, 3)
    x[:, 2] = 0
    assert float(eliminate(*sums(x, weight))[2]) == pytest.approx(0, abs=1e-12)
    nothing = torch.zeros(6, 6, dtype=torch.float64)
    assert eliminate(nothing, weight.T @ weight).tolist() == [0.0] * 6
    assert eliminate(nothing, nothing, 3).tolist() == [0.0] * 2
