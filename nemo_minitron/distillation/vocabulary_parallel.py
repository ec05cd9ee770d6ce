"""Losses over logits whose vocabulary is split over a tensor-parallel group.

Each is a custom autograd function: every rank computes its own columns, the few numbers that need all columns are
reduced over the group, and the gradient is written down in the forward pass. No rank ever holds the logits of another,
and autograd never sees a collective, so no gradient is counted once per rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

__all__ = ["vocabulary_parallel_forward_kl"]

CHUNK_BYTES = 32 * 2**20
"""Size of one working buffer; three are alive at a time, whatever the number of tokens."""


def vocabulary_parallel_forward_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    group: dist.ProcessGroup,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    inplace: bool = False,
) -> torch.Tensor:
    """``T^2 KL(p_teacher || p_student)`` of each token, from vocabulary-parallel logits.

    Equal in value and gradient to :func:`nemo_minitron.distillation.losses.forward_kl` on the gathered logits.

    Memory above the inputs: one gradient in the student's dtype (none if ``inplace``), and three buffers of
    :data:`CHUNK_BYTES`. Communication a chunk of tokens: one all-reduce of 2 and one of 3 numbers a token.

    Args:
        student: ``[..., V/tp]`` logits of this rank's columns; gradients flow here.
        teacher: ``[..., V/tp]`` logits of the same columns.
        group: tensor-parallel group; its rank ``r`` holds columns ``r V/tp`` to ``(r + 1) V/tp - 1``.
        vocab_size: true vocabulary; columns from there on are padding, and take no part.
        temperature: T, above 0.
        inplace: write the gradient over the student's logits, which the caller then may not read again (as
            Megatron's own vocabulary-parallel cross-entropy does with its logits).

    Returns:
        ``[...]`` float32 (float64 for float64 logits), the same on every rank of the group.

    Raises:
        ValueError: if the two have different shapes.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student logits {list(student.shape)} and teacher logits {list(teacher.shape)} differ in shape"
        )
    loss: torch.Tensor = _ForwardKL.apply(student, teacher.detach(), group, vocab_size, temperature, inplace)
    return loss


class _ForwardKL(torch.autograd.Function):
    """Forward KL with its gradient ``T (p_student - p_teacher)``."""

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        group: dist.ProcessGroup,
        vocab_size: int,
        temperature: float,
        inplace: bool,
    ) -> torch.Tensor:
        columns = student.shape[-1]
        valid = min(max(vocab_size - dist.get_rank(group) * columns, 0), columns)
        wide = torch.promote_types(student.dtype, torch.float32)
        q_logits, p_logits = student.detach().reshape(-1, columns), teacher.reshape(-1, columns)
        tokens = q_logits.shape[0]

        needs_gradient = ctx.needs_input_grad[0]
        gradient = q_logits if inplace else torch.empty_like(q_logits) if needs_gradient else None
        if gradient is not None and valid < columns:
            gradient[:, valid:] = 0
        loss = torch.empty(tokens, dtype=wide, device=student.device)

        size = max(1, CHUNK_BYTES // (max(valid, 1) * wide.itemsize))
        for start in range(0, tokens, size):
            chunk = slice(start, min(start + size, tokens))
            p = p_logits[chunk, :valid].to(wide, copy=True).div_(temperature)
            q = q_logits[chunk, :valid].to(wide, copy=True).div_(temperature)
            maxima = torch.stack([_row_max(p), _row_max(q)])
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
            p.sub_(maxima[0][:, None])
            q.sub_(maxima[1][:, None])
            difference = p - q
            p.exp_()
            q.exp_()
            sums = torch.stack([p.sum(-1), q.sum(-1), torch.linalg.vecdot(p, difference)])
            dist.all_reduce(sums, group=group)
            sum_p, sum_q, cross = sums
            # sum_v p_v (log p_v - log q_v), with log p_v = (shifted logit) - log sum_p.
            loss[chunk] = cross / sum_p - sum_p.log() + sum_q.log()
            if gradient is not None:
                q.div_(sum_q[:, None])
                q.sub_(p.div_(sum_p[:, None])).mul_(temperature)
                gradient[chunk, :valid] = q.to(gradient.dtype)

        if gradient is not None:
            ctx.save_for_backward(gradient.view(student.shape))
        return loss.mul_(temperature**2).view(student.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        (grad_output,) = grad_outputs
        return gradient.mul_(grad_output[..., None].to(gradient.dtype)), None, None, None, None, None


def _row_max(values: torch.Tensor) -> torch.Tensor:
    """``[n, v]`` -> ``[n]``; minus infinity where this rank holds only padding (v = 0)."""
    if values.shape[-1] == 0:
        return values.new_full((values.shape[0],), float("-inf"))
    return values.amax(-1)
