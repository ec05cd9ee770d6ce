"""The losses as written in the papers, on whole logits in one process. The reference for everything faster.

Each takes ``[..., V]`` logits over the true vocabulary and returns ``[...]``, one number a token, in the logits' dtype;
the caller masks and normalises. No gradient flows to the teacher. Divergences come times T squared, which keeps the
gradient's size independent of the temperature (Hinton et al., arXiv 1503.02531, section 2).
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

__all__ = ["cross_entropy", "forward_kl", "jensen_shannon", "reverse_kl", "top_k_kl"]


def forward_kl(student: torch.Tensor, teacher: torch.Tensor, *, temperature: float = 1.0) -> torch.Tensor:
    """``T^2 KL(p_teacher || p_student)`` of each token, with ``p = softmax(logits / T)``.

    The logit loss of Minitron (arXiv 2407.14679, section 3).

    Args:
        student, teacher: ``[..., V]`` logits over the true vocabulary.
        temperature: T, above 0.

    Returns:
        ``[...]``, nats times T^2.
    """
    log_p, log_q = _log_probabilities(student, teacher, temperature)
    return functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1) * temperature**2


def reverse_kl(student: torch.Tensor, teacher: torch.Tensor, *, temperature: float = 1.0) -> torch.Tensor:
    """``T^2 KL(p_student || p_teacher)`` of each token: seeks a mode of the teacher (MiniLLM, arXiv 2306.08543)."""
    log_p, log_q = _log_probabilities(student, teacher, temperature)
    return functional.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1) * temperature**2


def jensen_shannon(
    student: torch.Tensor, teacher: torch.Tensor, *, beta: float = 0.5, temperature: float = 1.0
) -> torch.Tensor:
    """``T^2 (b KL(p_t || m) + (1 - b) KL(p_s || m))`` with ``m = b p_t + (1 - b) p_s`` (GKD, arXiv 2306.13649).

    Args:
        student, teacher: ``[..., V]``.
        beta: b, strictly between 0 and 1; divided by b, it tends to the forward KL as b goes to 0, and divided by
            1 - b to the reverse KL as b goes to 1.
        temperature: T.
    """
    log_p, log_q = _log_probabilities(student, teacher, temperature)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    to_teacher, to_student = ((log.exp() * (log - log_m)).sum(-1) for log in (log_p, log_q))
    return (beta * to_teacher + (1 - beta) * to_student) * temperature**2


def top_k_kl(student: torch.Tensor, teacher: torch.Tensor, *, k: int, temperature: float = 1.0) -> torch.Tensor:
    """``T^2 KL`` over the teacher's k likeliest tokens and a ghost token that has all other probability.

    With the ghost the k + 1 numbers are probabilities on both sides, so the loss is a divergence: never negative, and
    a lower bound of the forward KL (it is the forward KL of coarser outcomes). Without it, as in a KL of renormalised
    top-k probabilities, nothing would pull the student's other tokens down.

    Args:
        student, teacher: ``[..., V]``.
        k: tokens kept; from V on the loss is the forward KL.
        temperature: T.
    """
    log_p, log_q = _log_probabilities(student, teacher, temperature)
    vocabulary = log_p.shape[-1]
    if k >= vocabulary:
        return functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1) * temperature**2
    top = log_p.topk(k, dim=-1).indices
    ghost = torch.ones_like(log_p, dtype=torch.bool).scatter(-1, top, False)
    p, q = (
        torch.cat([log.gather(-1, top), log.masked_fill(~ghost, -torch.inf).logsumexp(-1, keepdim=True)], -1)
        for log in (log_p, log_q)
    )
    return functional.kl_div(q, p, log_target=True, reduction="none").sum(-1) * temperature**2


def cross_entropy(student: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """``-log p_student(label)`` of each token: the language-model loss, at temperature 1.

    Args:
        student: ``[..., V]``.
        labels: ``[...]`` token ids.
    """
    return -functional.log_softmax(student, dim=-1).gather(-1, labels[..., None]).squeeze(-1)


def _log_probabilities(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the teacher, which is detached, and of the student."""
    log_p = functional.log_softmax(teacher.detach() / temperature, dim=-1)
    return log_p, functional.log_softmax(student / temperature, dim=-1)
