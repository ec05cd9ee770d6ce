"""The forward and the reverse KL of one rank's columns as Triton kernels: two passes over the logits.

:func:`statistics` reads the logits once and keeps a running maximum and running sums in float32, so it needs no buffer.
:func:`derivative` reads them a second time and writes the student's gradient, over the student's logits if asked. What
is summed over the ranks in between is computed in :mod:`nemo_minitron.distillation.losses.kernels`, from the same
numbers as in the plain form.

Importing this module imports Triton; :func:`nemo_minitron.distillation.losses.triton_choice.triton_kernels` decides
when. The kernels have run in Triton's interpreter alone, never on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["BLOCK", "WARPS", "derivative", "statistics"]

BLOCK = 4096
"""Columns that a program has in registers at a time; a power of two."""
WARPS = 8
"""Of a program."""
#: A maximum before any column; finite, so that it may be subtracted from itself.
_LOWEST = torch.finfo(torch.float32).min


@triton.jit
def _statistics_kernel(  # type: ignore[no-untyped-def]
    p, q, maxima, sums, rows, stride_p, stride_q, valid, inverse_temperature, lowest,
    reverse: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    row = tl.program_id(0)
    p += row.to(tl.int64) * stride_p  # rows times vocabulary can exceed 32 bits
    q += row.to(tl.int64) * stride_q
    top_p, top_q = lowest, lowest
    sum_p, sum_q, cross = 0.0, 0.0, 0.0
    for start in range(0, valid, block):
        column = start + tl.arange(0, block)
        inside = column < valid
        z_p = tl.load(p + column, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
        z_q = tl.load(q + column, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
        new_p = tl.maximum(top_p, tl.max(tl.where(inside, z_p, lowest), 0))
        new_q = tl.maximum(top_q, tl.max(tl.where(inside, z_q, lowest), 0))
        exp_p = tl.where(inside, tl.exp(z_p - new_p), 0.0)
        exp_q = tl.where(inside, tl.exp(z_q - new_q), 0.0)
        # What was summed so far was less the maximum before.
        shrink_p, shrink_q = tl.exp(top_p - new_p), tl.exp(top_q - new_q)
        sum_p = sum_p * shrink_p + tl.sum(exp_p, 0)
        sum_q = sum_q * shrink_q + tl.sum(exp_q, 0)
        if reverse:
            cross = cross * shrink_q + tl.sum(exp_q * (z_q - z_p), 0)
        else:
            cross = cross * shrink_p + tl.sum(exp_p * (z_p - z_q), 0)
        top_p, top_q = new_p, new_q
    tl.store(maxima + row, top_p)
    tl.store(maxima + rows + row, top_q)
    tl.store(sums + row, sum_p)
    tl.store(sums + rows + row, sum_q)
    tl.store(sums + 2 * rows + row, cross)


@triton.jit
def _derivative_kernel(  # type: ignore[no-untyped-def]
    p, q, out, maxima, scales, means, rows, stride_p, stride_q, stride_out, valid, inverse_temperature,
    reverse: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program a row and block of columns. ``out`` may be ``q``: a column is read before it is written."""
    row = tl.program_id(0)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < valid
    z_p = tl.load(p + row.to(tl.int64) * stride_p + column, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
    z_q = tl.load(q + row.to(tl.int64) * stride_q + column, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
    of_q = tl.exp(z_q - tl.load(maxima + rows + row)) * tl.load(scales + rows + row)
    if reverse:
        value = of_q * (z_q - z_p - tl.load(means + row))
    else:
        value = of_q - tl.exp(z_p - tl.load(maxima + row)) * tl.load(scales + row)
    tl.store(out + row.to(tl.int64) * stride_out + column, value.to(out.dtype.element_ty), mask=inside)


def statistics(
    p: torch.Tensor, q: torch.Tensor, *, temperature: float, reverse: bool = False, block: int = BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of this rank's columns, in one pass; ``z`` are the logits over the temperature.

    Args:
        p, q: ``[n, valid]`` float32, bfloat16 or float16, columns next to each other in memory; ``valid`` may be 0.
        temperature: above 0.
        reverse: the third sum is the reverse KL's.
        block: columns at a time.

    Returns:
        ``[2, n]`` float32, the maxima of ``z_p`` and of ``z_q``, and ``[3, n]``, the sums of ``exp(z_p - max)``, of
        ``exp(z_q - max)`` and of ``exp(z_p - max) (z_p - z_q)``, or ``exp(z_q - max) (z_q - z_p)`` where ``reverse``.
        Without columns: the least float32, and zeros.
    """
    rows, valid = q.shape
    maxima = torch.full((2, rows), _LOWEST, dtype=torch.float32, device=q.device)
    sums = torch.zeros(3, rows, dtype=torch.float32, device=q.device)
    if rows and valid:
        _statistics_kernel[(rows,)](
            p, q, maxima, sums, rows, p.stride(0), q.stride(0), valid, 1 / temperature, _LOWEST,
            reverse=reverse, block=block, num_warps=WARPS,
        )  # fmt: skip
    return maxima, sums


def derivative(
    p: torch.Tensor,
    q: torch.Tensor,
    out: torch.Tensor,
    maxima: torch.Tensor,
    scales: torch.Tensor,
    *,
    temperature: float,
    means: torch.Tensor | None = None,
    block: int = BLOCK,
) -> None:
    """Write the derivative by the student's logits, in one pass.

    With ``e = exp(z - maxima)`` it is ``scales_q e_q - scales_p e_p``; with ``means``, which is for the reverse KL,
    ``scales_q e_q (z_q - z_p - means)``.

    Args:
        p, q: as of :func:`statistics`.
        out: ``[n, valid]``, any of these dtypes; may be ``q``.
        maxima, scales: ``[2, n]`` float32, of teacher and student.
        temperature: as of :func:`statistics`.
        means: ``[n]`` float32.
        block: columns of a program.
    """
    rows, valid = q.shape
    if rows and valid:
        _derivative_kernel[(rows, triton.cdiv(valid, block))](
            p, q, out, maxima.contiguous(), scales.contiguous(), (maxima if means is None else means).contiguous(),
            rows, p.stride(0), q.stride(0), out.stride(0), valid, 1 / temperature,
            reverse=means is not None, block=block, num_warps=WARPS,
        )  # fmt: skip
