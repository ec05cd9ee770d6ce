"""Ridge regression towards the pruned weights, from sums over calibration tokens.

For a matrix with inputs ``x`` and targets ``y`` the solution is that of

    min_W  sum_t |W x_t - y_t|^2 + ridge * mean(diag G) * |W - W_0|^2,   G = sum_t x_t x_t'

with the pruned matrix ``W_0``. It needs ``G`` and ``C = sum_t y_t x_t'`` and no token. Sums and solutions are in
float64. The ridge is chosen on tokens that the solution did not see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["RIDGES", "Fit", "Sums", "solve"]

#: Ridges that are tried, relative to the mean of the diagonal, from the most careful one on. The last ones are for
#: units that others replace exactly.
RIDGES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 1e-4, 1e-6, 1e-9)
#: Ridges below are not tried where there are fewer tokens than columns: the solution would repeat the tokens.
CAREFUL = 0.1
#: The search ends after so many ridges in turn that were worse than the best.
PATIENCE = 2
_ROWS = 8192  # rows of a matrix that are solved for at once
_SAMPLE = 128  # rows of a matrix by which its ridge is chosen


class Sums:
    """Sums over tokens of the products of inputs and targets, in float64.

    Args:
        columns: ``k``, size of the inputs.
        rows: ``m``, size of the targets.
        square: keep the products of the targets with themselves too, for :meth:`mapped`.
        device: of the sums.

    Attributes:
        gram: ``[k, k]``, inputs with inputs.
        cross: ``[m, k]``, targets with inputs.
        power: ``[m, m]``, targets with targets, if ``square``; else a scalar, the sum of the targets' squares.
        tokens: how many were added.
    """

    def __init__(self, columns: int, rows: int, *, square: bool = False, device: torch.device | None = None) -> None:
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.gram = torch.zeros(columns, columns, **options)
        self.cross = torch.zeros(rows, columns, **options)
        self.power = torch.zeros((rows, rows) if square else (), **options)
        self.tokens = torch.zeros((), **options)

    @classmethod
    def of(cls, gram: torch.Tensor, cross: torch.Tensor, power: torch.Tensor, tokens: torch.Tensor) -> Sums:
        """Sums that are there already."""
        sums = cls(0, 0)
        sums.gram, sums.cross, sums.power, sums.tokens = gram, cross, power, tokens
        return sums

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Add ``[..., k]`` inputs and ``[..., m]`` targets of the same tokens.

        Those in half precision, whose products are exact in float32, are added up in float32 within this call.
        """
        half = inputs.dtype.itemsize < 4 and targets.dtype.itemsize < 4
        dtype = torch.float32 if half else torch.float64
        x, y = inputs.flatten(0, -2).to(dtype), targets.flatten(0, -2).to(dtype)
        self.gram += x.T @ x
        self.cross += y.T @ x
        if self.power.ndim:
            self.power += y.T @ y
        else:
            self.power += y.square().sum(dtype=torch.float64)
        self.tokens += len(x)

    def all_reduce(self, group: dist.ProcessGroup) -> None:
        """Add up what the ranks of a group have. Collective."""
        if dist.get_world_size(group) > 1:
            for part in (self.gram, self.cross, self.power, self.tokens):
                dist.all_reduce(part, group=group)

    def mapped(self, weight: torch.Tensor) -> Sums:
        """The sums with targets ``weight @ y`` in the place of ``y``; their power is known with ``square`` alone.

        Args:
            weight: ``[rows, m]`` float64.
        """
        known = self.power.ndim > 0
        power = ((weight @ self.power) * weight).sum() if known else torch.full_like(self.tokens, float("nan"))
        return Sums.of(self.gram, weight @ self.cross, power, self.tokens)

    def of_rows(self, rows: torch.Tensor) -> Sums:
        """The sums of some of the targets; their power is not known."""
        return Sums.of(self.gram, self.cross[rows], torch.full_like(self.tokens, float("nan")), self.tokens)

    def error(self, weight: torch.Tensor) -> torch.Tensor:
        """``sum_t |weight x_t - y_t|^2``, of targets that are kept as a scalar.

        Args:
            weight: ``[m, k]`` float64.
        """
        return ((weight @ self.gram - 2 * self.cross) * weight).sum() + self.power

    def __add__(self, other: Sums) -> Sums:
        return Sums.of(
            self.gram + other.gram, self.cross + other.cross, self.power + other.power, self.tokens + other.tokens
        )


@dataclass(frozen=True)
class Fit:
    """A refitted matrix.

    Attributes:
        weight: ``[m, k]`` float64; the pruned matrix where nothing better was found.
        ridge: that was chosen; None where the pruned matrix stays.
        before, after: error on the held-out tokens, relative to the targets' power; of the pruned matrix, and of the
            solution on the other tokens.
        short: there were fewer tokens than columns.
    """

    weight: torch.Tensor
    ridge: float | None
    before: float
    after: float
    short: bool = False


def solve(weight: torch.Tensor, fitted: Sums, held: Sums, *, ridges: Sequence[float] = RIDGES) -> Fit:
    """The matrix that fits best on held-out tokens.

    A solution for each ridge comes from ``fitted``; the one with the smallest error on ``held`` gives the ridge, with
    which all tokens together are solved for. A matrix of many rows is judged by some of them, evenly spaced, until its
    ridge is chosen. Where no solution is better than the pruned matrix on held-out tokens, or none is finite, the
    pruned matrix stays.

    Args:
        weight: ``[m, k]``, pruned.
        fitted: of the tokens that are solved for.
        held: of the tokens that are held out.
        ridges: relative to the mean of the diagonal, descending; the choice is among them.
    """
    start = weight.double()
    short = bool(fitted.tokens < len(fitted.gram))
    power = float(held.power)
    scale = 1 / power if power > 0 else 1.0
    before = float(held.error(start)) * scale
    chosen = _choose(start, fitted, held, careful(ridges) if short else ridges)
    change = None if chosen is None else _change(start, fitted, chosen)
    after = before if change is None else before + _growth(start, held, change) * scale
    final = None if chosen is None or not after < before else _change(start, fitted + held, chosen)
    if final is None:
        return Fit(start, None, before, before, short)
    return Fit(start + final, chosen, before, after, short)


def careful(ridges: Sequence[float]) -> list[float]:
    """Those that are tried where there are fewer tokens than columns."""
    return [ridge for ridge in ridges if ridge >= CAREFUL]


def _choose(start: torch.Tensor, fitted: Sums, held: Sums, ridges: Sequence[float]) -> float | None:
    """The ridge with the smallest error on held-out tokens; None where none lowers it."""
    if len(start) > _SAMPLE:
        rows = torch.linspace(0, len(start) - 1, _SAMPLE, device=start.device).round().long()
        start, fitted, held = start[rows], fitted.of_rows(rows), held.of_rows(rows)

    def growth(ridge: float) -> float:
        change = _change(start, fitted, ridge)
        return float("inf") if change is None else _growth(start, held, change)

    return best_ridge(ridges, growth, below=0.0)[0]


def best_ridge(ridges: Sequence[float], error: Callable[[float], float], *, below: float) -> tuple[float | None, float]:
    """The ridge with the smallest error, and that error; None and ``below`` where no error is smaller than ``below``.

    Args:
        ridges: from the most careful one on; the search ends after :data:`PATIENCE` in turn that were worse.
        error: of the solution with a ridge; infinite where there is none.
        below: error of the pruned matrix.
    """
    best, chosen, worse = below, None, 0
    for ridge in ridges:
        if chosen is not None and worse == PATIENCE:
            break
        value = error(ridge)
        worse = 0 if value < best else worse + 1
        if value < best:
            best, chosen = value, ridge
    return chosen, best


def _growth(start: torch.Tensor, sums: Sums, change: torch.Tensor) -> float:
    """By how much the error grows from ``start`` to ``start + change``; negative where it falls."""
    total = torch.zeros((), dtype=torch.float64, device=start.device)
    for first in range(0, len(start), _ROWS):
        rows = slice(first, first + _ROWS)
        total += (((2 * start[rows] + change[rows]) @ sums.gram - 2 * sums.cross[rows]) * change[rows]).sum()
    return float(total)


def _change(start: torch.Tensor, sums: Sums, ridge: float) -> torch.Tensor | None:
    """``(C - W_0 G) (G + ridge * mean(diag G) * I)^-1``; None where that is not finite."""
    regular = sums.gram.clone()
    regular.diagonal().add_(ridge * sums.gram.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(regular)
    del regular
    if int(failed):
        return None
    result = torch.empty_like(start)
    for first in range(0, len(start), _ROWS):
        rows = slice(first, first + _ROWS)
        missing = sums.cross[rows] - start[rows] @ sums.gram
        result[rows] = torch.cholesky_solve(missing.T, factor).T
    return result if bool(torch.isfinite(result).all()) else None
