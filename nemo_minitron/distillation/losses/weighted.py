"""The weighted sum of the divergences from several teachers, one teacher's logits in memory at a time.

Each divergence is :func:`~nemo_minitron.distillation.losses.vocabulary_parallel.vocabulary_parallel_loss` on the same
student's logits. Their gradients are taken at once, in the forward pass, and added up, so no teacher's logits wait for
the backward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from nemo_minitron.config import LossConfig
from nemo_minitron.distillation.losses.common import CommonTokens
from nemo_minitron.distillation.losses.kernels import TopTokens
from nemo_minitron.distillation.losses.vocabulary_parallel import (
    vocabulary_parallel_cross_entropy,
    vocabulary_parallel_loss,
)

__all__ = ["Scored", "WeightedLosses", "weighted_loss"]


@dataclass(frozen=True)
class Scored:
    """What one teacher says of a micro-batch.

    Attributes:
        logits: makes its logits, or likeliest tokens, as ``vocabulary_parallel_loss`` takes them.
        weights: ``[b]``, its share in the loss of each sequence; 0 where it does not teach.
        common: the tokens that its divergence is over; None for the student's whole vocabulary.
    """

    logits: Callable[[], torch.Tensor | TopTokens]
    weights: torch.Tensor
    common: CommonTokens | None = None


@dataclass(frozen=True)
class WeightedLosses:
    """Losses of each token, ``[s, b]`` float32 (float64 for float64 logits), the same on every rank of the group.

    Attributes:
        total: the loss that is trained; only it has a gradient.
        divergence: the weighted sum of the divergences.
        divergences: of each teacher, without its weight.
        cross_entropy: with the labels; None where none were given.
    """

    total: torch.Tensor
    divergence: torch.Tensor
    divergences: list[torch.Tensor]
    cross_entropy: torch.Tensor | None = None


def weighted_loss(
    student: torch.Tensor,
    teachers: Sequence[Scored],
    group: dist.ProcessGroup,
    *,
    vocab_size: int,
    loss: LossConfig,
    labels: torch.Tensor | None = None,
    inplace: bool = False,
) -> WeightedLosses:
    """``(1 - label_weight) sum_t w_t D(teacher t, student) + label_weight CE`` of each token.

    Memory above the student's logits: one teacher's logits, and of its gradients in the student's dtype one where
    there are two parts of the loss, two where there are more; one more without ``inplace``. Communication: that of each
    part's own loss.

    Args:
        student: ``[s, b, V/tp]`` logits of this rank's columns; gradients flow here.
        teachers: those that take part; the same on every rank of the group, in the same order.
        group, vocab_size, loss, labels, inplace: as of ``vocabulary_parallel_loss``.

    Raises:
        ValueError: as ``vocabulary_parallel_loss``, or if nothing takes part.
    """
    if loss.label_weight and labels is None:
        raise ValueError(f"label_weight={loss.label_weight}: needs labels")
    if not teachers and labels is None:
        raise ValueError("there is no teacher and no label to learn from")
    alone = dataclasses.replace(loss, label_weight=0.0)
    whole = torch.ones(student.shape[1], dtype=torch.float64)
    parts: list[tuple[Callable[[torch.Tensor, bool], torch.Tensor], torch.Tensor]] = [
        (_divergence(teacher, group, vocab_size, alone), teacher.weights * (1 - loss.label_weight))
        for teacher in teachers
    ]
    if labels is not None:
        given = labels
        parts.append(
            (
                lambda logits, over: vocabulary_parallel_cross_entropy(
                    logits, given, group, vocab_size=vocab_size, inplace=over
                ),
                whole * loss.label_weight,
            )
        )
    trained = torch.is_grad_enabled() and student.requires_grad
    values: list[torch.Tensor] = []
    gradient: torch.Tensor | None = None
    for number, (part, weights) in enumerate(parts):
        # The last part may write over the student's logits: nothing reads them after it.
        value, derivative = _taken(part, student.detach(), weights, trained, inplace and number + 1 == len(parts))
        values.append(value)
        if derivative is not None:
            gradient = derivative if gradient is None else gradient.add_(derivative)
        del derivative  # its memory goes before the next part
    total = _summed(values, [weights for _, weights in parts])
    if gradient is not None:
        total = _WithGradient.apply(student, total, gradient)
    divergences = values[: len(teachers)]
    return WeightedLosses(
        total,
        _summed(divergences, [teacher.weights for teacher in teachers]) if teachers else torch.zeros_like(values[0]),
        divergences,
        None if labels is None else values[-1],
    )


def _summed(values: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """``[s, b]`` each and ``[b]`` each -> ``[s, b]``. What has no weight takes no part, whatever its value."""
    total = torch.zeros_like(values[0])
    for value, weight in zip(values, weights, strict=True):
        share = weight.to(value)
        total += torch.where(share > 0, value * share, 0.0)
    return total


def _divergence(
    teacher: Scored, group: dist.ProcessGroup, vocab_size: int, loss: LossConfig
) -> Callable[[torch.Tensor, bool], torch.Tensor]:
    def of(logits: torch.Tensor, over: bool) -> torch.Tensor:
        return vocabulary_parallel_loss(
            logits, teacher.logits(), group, vocab_size=vocab_size, loss=loss, inplace=over, common=teacher.common
        ).total

    return of


def _taken(
    part: Callable[[torch.Tensor, bool], torch.Tensor],
    logits: torch.Tensor,
    weights: torch.Tensor,
    trained: bool,
    inplace: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The value of each token, and the derivative of the weighted sum; None where no gradient is wanted or it is 0."""
    wanted = trained and bool((weights > 0).any())
    if not wanted:
        with torch.no_grad():
            return part(logits, False), None
    with torch.enable_grad():
        leaf = logits.requires_grad_()
        value = part(leaf, inplace)
        (derivative,) = torch.autograd.grad(value, leaf, weights.to(value).expand(value.shape).contiguous())
    return value.detach(), derivative


class _WithGradient(torch.autograd.Function):
    """A value of each token whose gradient by the logits is known."""

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_outputs[0][..., None].to(gradient.dtype)), None, None
