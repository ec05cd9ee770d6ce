"""Rounding of numbers to few bits and back ("fake quantization"), with gradients that pass straight through.

The arithmetic is ModelOpt's, so that the numbers are the same: int4 of ``tensor_quant._tensor_quant``, FP8 of
``tensor_quant._fp8_eager``, NVFP4 of ``qtensor.NVFP4QTensor`` (its packing; its fake quantization needs CUDA). Unlike
``_fp8_eager``, whose cast makes NaN of what lies outside the range, numbers outside are clipped, as GPUs do.
"""

from __future__ import annotations

import torch

__all__ = ["fp8", "group_ranges", "int4", "nvfp4"]

_E4M3_MAX = 448.0
_E2M1_MAX = 6.0
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_SMALLEST = 1.0 / (1 << 24)  # ModelOpt: ranges up to this are zero


class _StraightThrough(torch.autograd.Function):
    """Forward: the rounded numbers; backward: the gradient as it is, but zero outside the range, where there is one."""

    @staticmethod
    def forward(ctx, x, rounded, limit):  # type: ignore[no-untyped-def]
        ctx.inside = None if limit is None else x.abs() <= limit
        return rounded

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad if ctx.inside is None else grad * ctx.inside, None, None


def _through(x: torch.Tensor, rounded: torch.Tensor, limit: torch.Tensor | None = None) -> torch.Tensor:
    out: torch.Tensor = _StraightThrough.apply(x, rounded.to(x.dtype), limit)
    return out


def group_ranges(x: torch.Tensor, group: int) -> torch.Tensor:
    """Largest absolute numbers of groups of columns: ``[..., n]`` -> ``[..., n / group]``."""
    return x.unflatten(-1, (-1, group)).abs().amax(-1)


def int4(x: torch.Tensor, group: int) -> torch.Tensor:
    """Round to -8..7 sevenths of the largest number of each group of columns.

    Args:
        x: ``[..., n]``, ``n`` a multiple of ``group``.
        group: columns that share a scale.

    Returns:
        The shape and dtype of ``x``; float32 arithmetic. No number lies outside its range: the gradient is the
        identity.
    """
    with torch.no_grad():
        groups = x.detach().float().unflatten(-1, (-1, group))
        ranges = groups.abs().amax(-1, keepdim=True)
        # a tensor, as in ModelOpt: of a Python number torch multiplies the reciprocal, which rounds differently
        scale = (ranges.new_tensor(7.0) / ranges).masked_fill(ranges <= _SMALLEST, 0.0)
        rounded = (groups * scale).round().clamp(-8.0, 7.0)
        rounded = (rounded / scale.masked_fill(ranges <= _SMALLEST, 1.0)).flatten(-2)
    return _through(x, rounded)


def fp8(x: torch.Tensor, limit: torch.Tensor, *, clips: bool = False) -> torch.Tensor:
    """Round to E4M3 with one scale, which maps ``limit`` to 448.

    Args:
        x: any shape.
        limit: largest absolute number, float32; broadcast to ``x``.
        clips: numbers may lie outside the range; they are clipped, and get no gradient.
    """
    with torch.no_grad():
        limit = limit.float()
        scale = _E4M3_MAX / limit.masked_fill(limit == 0, 1.0)
        rounded = (x.detach().float() * scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).float()
        rounded = rounded * (1 / scale)
    return _through(x, rounded, limit if clips else None)


def nvfp4(x: torch.Tensor, limit: torch.Tensor, group: int = 16) -> torch.Tensor:
    """Round to E2M1, with a scale in E4M3 for each group of columns, and one scale of all these.

    Args:
        x: ``[..., n]``, ``n`` a multiple of ``group``.
        limit: largest absolute number that the scales are made for, float32 scalar or ``[..., 1]``. Of groups that
            exceed it the numbers are clipped.
        group: columns that share a scale.

    Returns:
        The shape and dtype of ``x``. The gradient is the identity, as in ModelOpt.
    """
    with torch.no_grad():
        groups = x.detach().float().unflatten(-1, (-1, group))
        outer = limit.float() / (_E2M1_MAX * _E4M3_MAX)
        outer = outer.masked_fill(outer == 0, 1.0)
        outer = outer if outer.ndim == 0 else outer.unsqueeze(-1)
        scale = groups.abs().amax(-1, keepdim=True) / (_E2M1_MAX * outer)
        scale = scale.masked_fill(scale == 0, 1.0).clamp(max=_E4M3_MAX).to(torch.float8_e4m3fn).float()
        step = scale * outer
        # a scale below E4M3's smallest number is zero: so are the numbers
        size = (groups / step.masked_fill(step == 0, 1.0)).abs()
        bounds = torch.tensor(_E2M1_BOUNDS, device=x.device)
        place = torch.bucketize(size, bounds) + ((size == 0.75) | (size == 1.75) | (size == 3.5)).long()
        rounded = torch.tensor(_E2M1, device=x.device)[place] * step
        rounded = torch.where(groups < 0, -rounded, rounded).flatten(-2)
    return _through(x, rounded)
