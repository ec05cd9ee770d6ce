"""The same ridge regression where there are fewer tokens than columns: by products of tokens instead of columns.

With ``n`` tokens and ``k`` columns the solution of :mod:`~nemo_minitron.reconstruction.least_squares` is

    W = W_0 + R' (X X' + level * I)^-1 X,     R = Y - X W_0',     level = ridge * trace(X X') / k

whose system is ``[n, n]`` and not ``[k, k]``. One eigendecomposition serves all ridges. Wide matrices of large models
have so many columns that this is a matter of minutes or hours, and of gigabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from nemo_minitron.reconstruction import least_squares
from nemo_minitron.reconstruction.least_squares import RIDGES, Fit, Sums, best_ridge, careful

__all__ = ["Tokens", "make_sums", "solve"]

_ROWS = 4096  # rows of a matrix that are worked out at once


class Tokens:
    """Inputs and targets as they are, in float64; in the place of :class:`~.least_squares.Sums`.

    Args:
        columns: ``k``, size of the inputs.
        rows: ``m``, size of the targets.
        device: of the tensors.

    Attributes:
        inputs: ``[n, k]``.
        targets: ``[n, m]``.
        weight: ``[rows, m]`` in any dtype, which maps the targets; None leaves them.
    """

    def __init__(self, columns: int, rows: int, *, device: torch.device | None = None) -> None:
        self.inputs = torch.zeros(0, columns, dtype=torch.float64, device=device)
        self.targets = torch.zeros(0, rows, dtype=torch.float64, device=device)
        self.weight: torch.Tensor | None = None

    @classmethod
    def of(cls, inputs: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None) -> Tokens:
        """Tokens that are there already."""
        tokens = cls(0, 0)
        tokens.inputs, tokens.targets, tokens.weight = inputs, targets, weight
        return tokens

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Add ``[..., k]`` inputs and ``[..., m]`` targets of the same tokens."""
        self.inputs = torch.cat([self.inputs, inputs.flatten(0, -2).double()])
        self.targets = torch.cat([self.targets, targets.flatten(0, -2).double()])

    def all_reduce(self, group: dist.ProcessGroup) -> None:
        """Bring the tokens of the ranks of a group together. Collective."""
        world = dist.get_world_size(group)
        if world == 1:
            return
        device = self.inputs.device
        counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
        dist.all_gather(counts, torch.tensor([len(self.inputs)], device=device), group=group)
        most = max(int(count) for count in counts)
        for name in ("inputs", "targets"):
            mine = getattr(self, name)
            padded = torch.cat([mine, mine.new_zeros(most - len(mine), mine.shape[1])])
            everyone = [torch.empty_like(padded) for _ in range(world)]
            dist.all_gather(everyone, padded, group=group)
            parts = zip(everyone, counts, strict=True)
            setattr(self, name, torch.cat([part[: int(count)] for part, count in parts]))

    def mapped(self, weight: torch.Tensor) -> Tokens:
        """The tokens with targets ``weight @ y`` in the place of ``y``, which are worked out when they are needed.

        Args:
            weight: ``[rows, m]``.
        """
        return Tokens.of(self.inputs, self.targets, weight)

    def __add__(self, other: Tokens) -> Tokens:
        inputs = torch.cat([self.inputs, other.inputs])
        return Tokens.of(inputs, torch.cat([self.targets, other.targets]), self.weight)


def make_sums(columns: int, rows: int, most: int, *, square: bool = False, device: torch.device) -> Sums | Tokens:
    """What gathers inputs and targets: tokens where they are fewer than the columns, else their sums.

    Args:
        columns, rows, square, device: as of :class:`~.least_squares.Sums`.
        most: as many tokens as there can be, on all ranks.
    """
    if most < columns:
        return Tokens(columns, rows, device=device)
    return Sums(columns, rows, square=square, device=device)


def solve(weight: torch.Tensor, fitted: Sums | Tokens, held: Sums | Tokens, *, ridges: Sequence[float] = RIDGES) -> Fit:
    """:func:`nemo_minitron.reconstruction.least_squares.solve`, of sums or of tokens."""
    if isinstance(fitted, Sums) and isinstance(held, Sums):
        return least_squares.solve(weight, fitted, held, ridges=ridges)
    assert isinstance(fitted, Tokens), "both are gathered alike"
    assert isinstance(held, Tokens), "both are gathered alike"
    columns, tokens = weight.shape[1], len(fitted.inputs)
    short = tokens < columns
    both = fitted + held
    lacking, powers = _lacking(weight, both)
    power, before = float(powers[tokens:].sum()), float(_squares(lacking[tokens:]).sum())
    scale = 1 / power if power > 0 else 1.0
    errors = _errors(both.inputs, lacking, tokens)
    chosen, best = best_ridge(careful(ridges) if short else ridges, errors, below=before)
    final = None if chosen is None else _solution(weight, both.inputs, lacking, chosen)
    if final is None:
        return Fit(weight.double(), None, before * scale, before * scale, short)
    return Fit(final, chosen, before * scale, best * scale, short)


def _lacking(start: torch.Tensor, both: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """``[n, m]``, what the pruned matrix lacks of the targets, and ``[n]`` float64, the targets' squares.

    Products with a matrix in half precision are in float32, as the solution is rounded to half precision again.
    """
    work = torch.float64 if start.dtype in (torch.float32, torch.float64) else torch.float32
    inputs, given = both.inputs.to(work), both.targets.to(work)
    lacking = torch.empty(len(inputs), len(start), dtype=work, device=inputs.device)
    powers = torch.zeros(len(inputs), dtype=torch.float64, device=inputs.device)
    for first in range(0, len(start), _ROWS):
        rows = slice(first, first + _ROWS)
        targets = given[:, rows] if both.weight is None else given @ both.weight[rows].to(work).T
        powers += _squares(targets)
        lacking[:, rows] = torch.addmm(targets, inputs, start[rows].to(work).T, alpha=-1)
    return lacking, powers


def _squares(values: torch.Tensor) -> torch.Tensor:
    """``[n, m] -> [n]`` float64, sums of squares."""
    return values.square().sum(1, dtype=torch.float64)


def _errors(inputs: torch.Tensor, lacking: torch.Tensor, tokens: int) -> Callable[[float], float]:
    """Ridge -> error of its solution by the first tokens, on those after them."""
    fitted, held = inputs[:tokens], inputs[tokens:]
    gram = fitted @ fitted.T
    if not bool(torch.isfinite(gram).all()):
        return lambda _: float("inf")
    mean = float(gram.diagonal().sum()) / inputs.shape[1]
    values, vectors = torch.linalg.eigh(gram)
    across = held @ fitted.T @ vectors
    known = vectors.to(lacking.dtype).T @ lacking[:tokens]

    def error(ridge: float) -> float:
        shares = across / (values.clamp_min(0) + ridge * mean)
        value = float(_squares(torch.addmm(lacking[tokens:], shares.to(known.dtype), known, alpha=-1)).sum())
        return value if value == value else float("inf")

    return error


def _solution(start: torch.Tensor, inputs: torch.Tensor, lacking: torch.Tensor, ridge: float) -> torch.Tensor | None:
    """``[m, k]`` float64, by all tokens; None where it is not finite."""
    gram = inputs @ inputs.T
    gram.diagonal().add_(ridge * gram.diagonal().sum() / start.shape[1])
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        return None
    shared = torch.cholesky_solve(inputs, factor).to(lacking.dtype)  # (X X' + level * I)^-1 X
    result = torch.empty(start.shape, dtype=torch.float64, device=start.device)
    for first in range(0, len(start), _ROWS):
        rows = slice(first, first + _ROWS)
        result[rows] = start[rows].double() + lacking[:, rows].T @ shared
    return result if bool(torch.isfinite(result).all()) else None
