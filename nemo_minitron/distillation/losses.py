"""The losses as written in the papers, on whole logits in one process. The reference for everything faster."""

from __future__ import annotations

import torch
from torch.nn import functional

__all__ = ["forward_kl"]


def forward_kl(student: torch.Tensor, teacher: torch.Tensor, *, temperature: float = 1.0) -> torch.Tensor:
    """``T^2 KL(p_teacher || p_student)`` of each token, with ``p = softmax(logits / T)``.

    The logit loss of Minitron (arXiv 2407.14679, section 3); the factor T^2 keeps the gradient's size independent of
    the temperature (Hinton et al., arXiv 1503.02531, section 2).

    Args:
        student, teacher: ``[..., V]`` logits over the true vocabulary.
        temperature: T, above 0.

    Returns:
        ``[...]``, nats times T^2, in the logits' dtype. No gradient flows to the teacher.
    """
    log_p = functional.log_softmax(teacher.detach() / temperature, dim=-1)
    log_q = functional.log_softmax(student / temperature, dim=-1)
    return functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1) * temperature**2
