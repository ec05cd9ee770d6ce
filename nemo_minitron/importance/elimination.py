"""What a matrix loses when some of its inputs go and the others make up for them.

A matrix ``W`` reads inputs ``x``, with ``G = sum_t x_t x_t'`` over calibration tokens. When the inputs ``S`` are
removed and the weights of the others are solved for again, towards their old values, the loss is

    T(S) = min  sum_t |V x_t - W x_t|^2 + r |V_K - W_K|^2      over V with V_S = 0; K: the inputs that stay
         = tr(W_S [(M_SS)^-1 - r I] W_S'),                     M = (G + r I)^-1

This is the optimal brain surgeon's rule (Hassibi and Stork, NIPS 1992; for a layer's outputs, Frantar and Alistarh,
arXiv 2208.11580) with groups of inputs in the place of single weights. ``W`` enters by ``W'W`` alone.

Taken one at a time, two inputs of which each can stand in for the other would both be free. So they are removed one
after the other, the cheapest first, each given those that went before: greedy elimination, as in ZipLM (Kurtic et al.,
arXiv 2302.04089) and SlimGPT (Ling et al., arXiv 2412.18110).
"""

from __future__ import annotations

import torch

__all__ = ["RIDGE", "eliminate"]

#: ``r`` relative to the mean of the diagonal of ``G``, that of most matrices in a reconstruction.
RIDGE = 0.1
_PANEL = 64  # single inputs that go before the matrices are updated


@torch.no_grad()
def eliminate(
    gram: torch.Tensor, outer: torch.Tensor, width: int = 1, *, per_group: int | None = None, ridge: float = RIDGE
) -> torch.Tensor:
    """The loss after each unit's removal, in a greedy order: the higher, the more important.

    A unit's number is ``T(S)`` of the unit and all that went before it, over ``tr(W G W')``. So the units with the
    highest numbers are those that stay, however many, and the highest number left out is what their removal costs.

    Memory: some four matrices of the size of ``gram``. Operations: some ``3 k^3``.

    Args:
        gram: ``[k, k]``, ``G``; float64.
        outer: ``[k, k]``, ``W'W``; float64.
        width: neighbouring inputs that make a unit.
        per_group: units of a group, if units go from all groups evenly: no group loses its second before each has lost
            its first.
        ridge: ``r`` relative to the mean of the diagonal.

    Returns:
        ``[k / width]`` float64; zeros if the matrix gives nothing.
    """
    units = len(gram) // width
    total = (gram * outer).sum()
    if not bool(total > 0):
        return gram.new_zeros(units)
    level = ridge * gram.diagonal().mean()
    if width == 1 and per_group is None:
        order, steps = _single(_inverse(gram, level), outer, level)
    else:
        order, steps = _blocks(_inverse(gram, level), outer, level, width, per_group or units)
    losses = gram.new_empty(units)
    # T falls where the ridge held a weight to its old value that nothing needed any more; an order needs no fall.
    losses[order] = steps.cumsum(0).cummax(0).values / total
    return losses


def _inverse(gram: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    regular = gram.clone()
    regular.diagonal().add_(level)
    return torch.cholesky_inverse(torch.linalg.cholesky(regular))


def _single(inverse: torch.Tensor, outer: torch.Tensor, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs in the order in which they go, and what each adds to ``T``.

    When input ``q`` goes, ``M`` becomes ``M - m m' / m_q`` with its column ``m``, and the weights of the others take
    ``c = m / m_q`` of its own: ``W'W`` becomes ``W'W - c u' - u c'`` with ``u = d - c d_q / 2`` and its column ``d``.
    As in a Cholesky factorisation with pivots, the diagonals are updated at once, the matrices after a panel of inputs.
    """
    size = len(inverse)
    here = torch.arange(size, device=inverse.device)  # of the inputs that are left
    kept_penalty = level * outer.diagonal()
    order, steps = torch.empty_like(here), inverse.new_empty(size)
    for first in range(0, size, _PANEL):
        count = min(_PANEL, size - first)
        scaled, shares, updates = (inverse.new_zeros(len(here), count) for _ in range(3))
        diagonal, squares = inverse.diagonal().clone(), outer.diagonal().clone()
        gone = torch.zeros_like(here, dtype=torch.bool)
        for step in range(count):
            costs = (squares / diagonal - kept_penalty).masked_fill(gone, float("inf"))
            pivot = int(costs.argmin())
            order[first + step], steps[first + step] = here[pivot], costs[pivot]
            column = inverse[:, pivot] - scaled[:, :step] @ scaled[pivot, :step]
            products = outer[:, pivot] - shares[:, :step] @ updates[pivot, :step]
            products -= updates[:, :step] @ shares[pivot, :step]
            share = column / column[pivot]
            update = products - share * (products[pivot] / 2)
            scaled[:, step], shares[:, step], updates[:, step] = column / column[pivot].sqrt(), share, update
            diagonal -= column * share
            squares -= 2 * share * update
            gone[pivot] = True
        left = ~gone
        here, kept_penalty = here[left], kept_penalty[left]
        scaled, shares, updates = scaled[left], shares[left], updates[left]
        inverse = inverse[left][:, left].addmm_(scaled, scaled.T, alpha=-1)
        outer = outer[left][:, left].addmm_(shares, updates.T, alpha=-1).addmm_(updates, shares.T, alpha=-1)
    return order, steps


def _blocks(
    inverse: torch.Tensor, outer: torch.Tensor, level: torch.Tensor, width: int, per_group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`_single`, of units of several inputs; no group is two units behind another."""
    units = len(inverse) // width
    here = list(range(units))
    penalty = level * outer.diagonal().view(units, width).sum(1)
    order, steps = [], []
    left = [per_group] * -(-units // per_group)  # in each group
    while here:
        costs = _traces(inverse, outer, width) - penalty[here]
        most = max(left)
        allowed = [place for place, unit in enumerate(here) if left[unit // per_group] == most]
        place = min(allowed, key=costs.tolist().__getitem__)
        unit = here.pop(place)
        left[unit // per_group] -= 1
        order.append(unit)
        steps.append(costs[place])
        going = torch.zeros(len(inverse), dtype=torch.bool, device=inverse.device)
        going[place * width : (place + 1) * width] = True
        staying = ~going
        shares = torch.linalg.solve(inverse[going][:, going], inverse[going][:, staying])  # [width, k]
        products = outer[staying][:, going] - shares.T @ outer[going][:, going] / 2
        inverse = inverse[staying][:, staying] - inverse[staying][:, going] @ shares
        outer = outer[staying][:, staying] - products @ shares - (products @ shares).T
    return torch.tensor(order, device=penalty.device), torch.stack(steps)


def _traces(inverse: torch.Tensor, outer: torch.Tensor, width: int) -> torch.Tensor:
    """``[units]``: ``tr((M_BB)^-1 W_B'W_B)`` of each unit ``B``."""
    units = len(inverse) // width
    own = torch.arange(units, device=inverse.device)
    blocks, products = (matrix.view(units, width, units, width)[own, :, own] for matrix in (inverse, outer))
    return torch.linalg.solve(blocks, products).diagonal(dim1=1, dim2=2).sum(1)
