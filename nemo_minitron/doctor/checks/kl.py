"""The vocabulary-parallel KL and its gradient, against the plain formula in float64."""

from __future__ import annotations

import torch
import torch.distributed as dist

from nemo_minitron.distillation.losses.vocabulary_parallel import vocabulary_parallel_forward_kl
from nemo_minitron.doctor.checks import Context
from nemo_minitron.shape import padded_vocab

__all__ = ["reference", "run"]

TOKENS, VOCABULARY = 96, 1021
TEMPERATURE = 2.0


def run(context: Context) -> dict[str, torch.Tensor]:
    """``kl`` ``[tokens]`` and ``gradient`` ``[tokens, V]`` of the weighted sum over tokens, by the student's logits."""
    groups = context.groups()
    device = groups.device.torch
    student, teacher, weights = _logits()
    wide = padded_vocab(VOCABULARY, tensor=context.layout.tensor)
    columns = slice(*(wide // context.layout.tensor * place for place in (groups.tp_rank, groups.tp_rank + 1)))
    student_part, teacher_part = (
        torch.nn.functional.pad(logits, (0, wide - VOCABULARY))[:, columns].to(device, context.dtype).contiguous()
        for logits in (student, teacher)
    )
    student_part.requires_grad_()
    losses = vocabulary_parallel_forward_kl(
        student_part, teacher_part, groups.tp, vocab_size=VOCABULARY, temperature=TEMPERATURE
    )  # fmt: skip
    (losses * weights.to(device)).sum().backward()
    assert student_part.grad is not None
    gradient = student_part.grad.float().contiguous()
    parts = [torch.empty_like(gradient) for _ in range(context.layout.tensor)]
    dist.all_gather(parts, gradient, group=groups.tp)
    if groups.tp_rank or groups.dp_rank or groups.pp_rank:
        return {}
    whole = torch.cat(parts, dim=-1).cpu()
    return {"kl": losses.detach().float().cpu(), "gradient": whole[:, :VOCABULARY].contiguous()}


def reference(context: Context) -> dict[str, torch.Tensor]:
    """The definition, differentiated by autograd."""
    student, teacher, weights = (tensor.double() for tensor in _logits())
    student.requires_grad_()
    q = torch.log_softmax(student / TEMPERATURE, dim=-1)
    p = torch.log_softmax(teacher / TEMPERATURE, dim=-1)
    kl = TEMPERATURE**2 * (p.exp() * (p - q)).sum(-1)
    (kl * weights).sum().backward()
    assert student.grad is not None
    return {"kl": kl.detach(), "gradient": student.grad}


def _logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of student and teacher ``[tokens, V]``, whole in bfloat16, and weights of the tokens."""
    generator = torch.Generator().manual_seed(7)
    student, teacher = ((3 * torch.randn(TOKENS, VOCABULARY, generator=generator)).bfloat16().float() for _ in range(2))
    return student, teacher, torch.rand(TOKENS, generator=generator)
