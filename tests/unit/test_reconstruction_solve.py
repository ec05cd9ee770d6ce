"""Least squares from sums: against float64 references, the choice of the ridge, what cannot be solved."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_minitron.reconstruction import Sums, few_tokens, solve


def problem(tokens, columns, rows, *, seed=0, noise=0.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    true = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    y = x @ true.T + noise * torch.randn(tokens, rows, generator=generator, dtype=torch.float64)
    return x, y, true


def summed(x, y, **options):
    sums = Sums(x.shape[-1], y.shape[-1], **options)
    sums.add(x, y)
    return sums


def reference(x, y, start, ridge):
    """The stacked system, by torch's own least squares."""
    level = (ridge * x.square().sum(0).mean()).sqrt()
    eye = torch.eye(x.shape[1], dtype=torch.float64)
    return torch.linalg.lstsq(torch.cat([x, level * eye]), torch.cat([y, level * start.T])).solution.T


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(2, 60),
    columns=st.integers(1, 20),
    rows=st.integers(1, 9),
    ridge=st.sampled_from([1.0, 0.1, 0.01]),
    seed=st.integers(0, 1000),
)
def test_equals_a_float64_reference(tokens, columns, rows, ridge, seed):
    x, y, _ = problem(tokens, columns, rows, seed=seed, noise=0.1)
    start = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    half = tokens // 2
    fit = solve(start, summed(x[:half], y[:half]), summed(x[half:], y[half:]), ridges=[ridge])
    if fit.ridge is None:  # nothing better on what was held out, or too few tokens for the ridge
        assert torch.equal(fit.weight, start)
        return
    torch.testing.assert_close(fit.weight, reference(x, y, start, ridge), rtol=1e-8, atol=1e-8)
    held = reference(x[:half], y[:half], start, ridge)
    relative = (x[half:] @ held.T - y[half:]).square().sum() / y[half:].square().sum()
    assert fit.after == pytest.approx(float(relative), rel=1e-6, abs=1e-12)
    assert fit.after < fit.before


def test_the_ridge_is_the_one_that_is_best_on_held_out_tokens():
    x, y, true = problem(40, 30, 5, noise=3.0)
    start = true + 0.05 * torch.randn(true.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    fitted, held = summed(x[:32], y[:32]), summed(x[32:], y[32:])
    tried = {ridge: solve(start, fitted, held, ridges=[ridge]).after for ridge in (3.0, 1.0, 0.3, 0.1)}
    assert solve(start, fitted, held, ridges=list(tried)).after == min(tried.values())


def test_a_matrix_that_cannot_be_made_better_stays():
    x, y, true = problem(200, 10, 4)
    fit = solve(true, summed(x[:150], y[:150]), summed(x[150:], y[150:]))
    assert torch.equal(fit.weight, true)
    assert fit.ridge is None
    assert fit.before == pytest.approx(0, abs=1e-12)


def test_fewer_tokens_than_columns_ask_for_a_strong_ridge():
    x, y, true = problem(12, 30, 4)
    fit = solve(torch.zeros_like(true), summed(x[:9], y[:9]), summed(x[9:], y[9:]))
    assert fit.short
    assert fit.ridge is None or fit.ridge >= 0.1


def test_what_is_not_finite_leaves_the_matrix():
    x, y, true = problem(30, 5, 2)
    broken = y.clone()
    broken[0, 0] = float("nan")
    fit = solve(true, summed(x[:20], broken[:20]), summed(x[20:], y[20:]))
    assert torch.equal(fit.weight, true)


def test_mapped_targets_are_those_of_a_matrix():
    x, n, _ = problem(50, 6, 8)
    weight = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    mapped = summed(x, n, square=True).mapped(weight)
    direct = summed(x, n @ weight.T)
    torch.testing.assert_close(mapped.cross, direct.cross)
    torch.testing.assert_close(mapped.power, direct.power)
    start = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(mapped.error(start), (x @ start.T - n @ weight.T).square().sum())


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 20), columns=st.integers(24, 40), mapped=st.booleans(), seed=st.integers(0, 2**31))
def test_few_tokens_give_what_their_sums_give(tokens, columns, mapped, seed):
    draw = torch.Generator().manual_seed(seed)
    x, y = torch.randn(tokens + 4, columns, generator=draw), torch.randn(tokens + 4, 5, generator=draw)
    weight = torch.randn(7 if mapped else 5, columns, generator=draw)
    whole = torch.randn(7, 5, generator=draw).double()
    fits = []
    for most in (columns, columns - 1):  # sums, tokens
        both = [few_tokens.make_sums(columns, 5, most, square=mapped, device=torch.device("cpu")) for _ in range(2)]
        both[0].add(x[:tokens], y[:tokens])
        both[1].add(x[tokens:], y[tokens:])
        both = [part.mapped(whole) for part in both] if mapped else both
        fits.append(few_tokens.solve(weight, *both))
    assert [type(part) for part in both] == [few_tokens.Tokens] * 2
    assert fits[0].ridge == fits[1].ridge
    assert fits[1].short
    for name in ("weight", "before", "after"):
        expected = torch.as_tensor(getattr(fits[0], name))
        torch.testing.assert_close(torch.as_tensor(getattr(fits[1], name)), expected, rtol=1e-9, atol=1e-10)


def test_few_tokens_that_are_not_finite_or_none_leave_the_matrix():
    weight = torch.randn(5, 24)
    for tokens in (torch.full((3, 24), float("nan")), torch.zeros(0, 24)):
        both = [few_tokens.make_sums(24, 5, 10, device=torch.device("cpu")) for _ in range(2)]
        for part in both:
            part.add(tokens, torch.ones(len(tokens), 5))
        assert few_tokens.solve(weight, *both).ridge is None


@pytest.mark.parametrize("hidden", [5, 3])
def test_products_of_the_vocabularys_rows(monkeypatch, hidden):
    """Some rows at a time, with and without hidden channels that went: as of the whole matrices."""
    from nemo_minitron.reconstruction import ends

    monkeypatch.setattr(ends, "_ROWS", 4)
    whole = torch.randn(11, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    own = whole[:, :hidden].contiguous()
    a, b = (matrix.double() - matrix.double().mean(0) for matrix in (own, whole))
    for product, expected in zip(ends._products(own, whole), (a.T @ a, a.T @ b, b.T @ b), strict=True):
        torch.testing.assert_close(product, expected, rtol=1e-12, atol=1e-12)
