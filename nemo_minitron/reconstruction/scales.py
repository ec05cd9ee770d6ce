"""Ridge regression of the scale of a norm, each channel by itself, from sums over calibration tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from nemo_minitron.reconstruction.least_squares import Fit

__all__ = ["ChannelSums"]


class ChannelSums:
    """:class:`~nemo_minitron.reconstruction.Sums` of scales: every channel has one input and one target."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.xx, self.xy, self.yy = (torch.zeros(size, dtype=torch.float64, device=device) for _ in range(3))

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Add ``[tokens, h]`` inputs and targets."""
        self.xx += inputs.square().sum(0)
        self.xy += (inputs * targets).sum(0)
        self.yy += targets.square().sum(0)

    def all_reduce(self, group: dist.ProcessGroup) -> None:
        """Add up what the ranks have. Collective."""
        for part in (self.xx, self.xy, self.yy):
            dist.all_reduce(part, group=group)

    def error(self, factor: torch.Tensor) -> float:
        """Of all channels, relative to the targets' power."""
        return float((factor.square() * self.xx - 2 * factor * self.xy + self.yy).sum() / self.yy.sum())

    def solve(self, held: ChannelSums, ridges: Sequence[float]) -> Fit:
        """The factors that fit best on held-out tokens, as :func:`nemo_minitron.reconstruction.solve` finds them."""
        ones = torch.ones_like(self.xx)
        before = best = held.error(ones)
        chosen = None
        for ridge in ridges:
            error = held.error(self._factors(ridge, self.xx, self.xy))
            if error < best:
                best, chosen = error, ridge
        if chosen is None:
            return Fit(ones[None], None, before, before)
        return Fit(self._factors(chosen, self.xx + held.xx, self.xy + held.xy)[None], chosen, before, best)

    @staticmethod
    def _factors(ridge: float, xx: torch.Tensor, xy: torch.Tensor) -> torch.Tensor:
        level = ridge * xx.mean()
        return (xy + level) / (xx + level)
