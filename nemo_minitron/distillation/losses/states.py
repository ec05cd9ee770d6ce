"""Losses between the states inside two models, as the papers write them: one process, whole tensors.

Each returns one number per token in the wider of the two dtypes (float32 at least); the caller masks and normalises. No
gradient flows to the teacher. The live student (:mod:`~nemo_minitron.distillation.losses.state_hooks`) calls the same
functions on its rank's part of the states.
"""

from __future__ import annotations

import torch
from torch.nn import functional

__all__ = ["attention_relations", "hidden_cosine", "hidden_mse"]

#: Below any score of a softmax; finite, so that what is masked gives 0 times a number, and not 0 times infinity.
_MASKED = -1e30


def hidden_mse(student: torch.Tensor, teacher: torch.Tensor, projection: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared error of each token's state, over the teacher's channels.

    One of the losses that Minitron compares for intermediate states (arXiv 2407.14679, section 3); the learned matrix
    between unequal widths is that of TinyBERT (arXiv 1909.10351, equation 8).

    Args:
        student: ``[..., H_s]`` hidden states, or the embedding's output.
        teacher: ``[..., H_t]``.
        projection: ``[H_t, H_s]``, applied to the student's states; None where the widths are equal.

    Returns:
        ``[...]``.
    """
    student_states, teacher_states = _projected(student, teacher, projection)
    return (student_states - teacher_states).square().mean(-1)


def hidden_cosine(student: torch.Tensor, teacher: torch.Tensor, projection: torch.Tensor | None = None) -> torch.Tensor:
    """``1 - cos`` of each token's state: the direction alone counts (Minitron, arXiv 2407.14679, section 3).

    Args:
        student, teacher, projection: as for :func:`hidden_mse`.

    Returns:
        ``[...]``, between 0 and 2.
    """
    student_states, teacher_states = _projected(student, teacher, projection)
    return 1 - functional.cosine_similarity(student_states, teacher_states, dim=-1)


def attention_relations(
    student: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    teacher: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    heads: int,
    masked: torch.Tensor,
    columns: tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]] | None = None,
) -> torch.Tensor:
    """Divergence of the self-relations of queries, keys and values (MiniLMv2, arXiv 2012.15828, section 3.1).

    The projected queries of all attention heads stand side by side and are split anew into R relation heads, so that
    the two models may differ in the number and width of their heads. Of each relation head, token i relates to token j
    by ``softmax_j(q_i q_j / sqrt(d_r))``; the loss of token i is ``KL(teacher || student)`` of its row, the mean over
    the relation heads, the sum over queries, keys and values. In a decoder a row has the tokens that attention may look
    at. Queries and keys are taken as they are projected, before any rotation.

    Args:
        student, teacher: queries, keys and values ``[b, s, C]``, each with its own C, a multiple of ``heads``.
        heads: R.
        masked: ``[b or 1, s, s]``, True where attention is not allowed.
        columns: the student's and the teacher's tokens j, where ``student`` and ``teacher`` are a part of the tokens i
            alone: ``[b, s_j, C]``, and ``masked`` is ``[b or 1, s_i, s_j]``.

    Returns:
        ``[b, s]``, of the tokens i.

    Raises:
        ValueError: if the relation heads do not divide the channels.
    """
    total: torch.Tensor | None = None
    for ours, theirs, our_columns, their_columns in zip(
        student, teacher, *(columns or (student, teacher)), strict=True
    ):
        log_q = _relations(ours, our_columns, heads, masked)
        log_p = _relations(theirs.detach(), their_columns.detach(), heads, masked)
        rows = functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean(1)
        total = rows if total is None else total + rows
    assert total is not None
    return total


def _projected(
    student: torch.Tensor, teacher: torch.Tensor, projection: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if projection is not None:
        student = functional.linear(student, projection.to(student.dtype))
    if student.shape != teacher.shape:
        raise ValueError(f"states {list(student.shape)} of the student and {list(teacher.shape)} of the teacher differ")
    return _wide(student), _wide(teacher.detach())


def _relations(rows: torch.Tensor, columns: torch.Tensor, heads: int, masked: torch.Tensor) -> torch.Tensor:
    """``[b, s_i, C]`` and ``[b, s_j, C]`` -> ``[b, R, s_i, s_j]`` log-probabilities."""
    channels = rows.shape[-1]
    if channels % heads:
        raise ValueError(f"{channels} channels cannot be split into {heads} relation heads")
    row_heads, column_heads = (
        _wide(x).unflatten(-1, (heads, channels // heads)).transpose(1, 2) for x in (rows, columns)
    )
    scores = row_heads @ column_heads.transpose(-1, -2) * (channels // heads) ** -0.5
    return functional.log_softmax(scores.masked_fill(masked[:, None], _MASKED), dim=-1)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype is torch.float64 else x.float()
