"""A program for Triton's interpreter: the Triton losses against float64 and the plain form; errors as JSON.

Triton reads ``TRITON_INTERPRET`` as it is imported, so this is a process of its own. Errors are parts of the largest
entry of what is expected.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from nemo_minitron.config import LossConfig
from nemo_minitron.distillation.losses import kernels, reference, triton_choice, triton_kernels
from nemo_minitron.distillation.losses.common import CommonTokens
from nemo_minitron.distillation.losses.fused_head import OutputHead, fused_head_loss
from nemo_minitron.distillation.losses.kernels import Columns
from nemo_minitron.distillation.losses.vocabulary_parallel import vocabulary_parallel_loss

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = {"forward_kl": reference.forward_kl, "reverse_kl": reference.reverse_kl}
TOKENS = 5


def error(taken: torch.Tensor, exact: torch.Tensor) -> float:
    return ((taken.double() - exact.double()).abs().max() / exact.double().abs().max().clamp(min=1e-30)).item()


def logits(vocab: int, dtype: torch.dtype, seed: int = 0, scale: float = 4.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(TOKENS, vocab, generator=generator) for _ in range(2))
    return student.to(dtype), teacher.to(dtype)


def exact(kind: str, student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> tuple[torch.Tensor, Any]:
    """Value and gradient of the sum, in float64."""
    leaf = student.double().requires_grad_()
    value = KINDS[kind](leaf, teacher.double(), temperature=temperature)
    value.sum().backward()
    return value.detach(), leaf.grad


def against_float64(group: Any) -> dict[str, dict[str, float]]:
    """Through the public function; the last blocks are partly filled, and the strides are larger than the rows."""
    found = {}
    for name, dtype in DTYPES.items():
        for kind in KINDS:
            for vocab, temperature in ((1, 1.0), (7, 0.7), (1001, 1.0), (triton_kernels.BLOCK + 905, 2.0)):
                student, teacher = logits(vocab + 3, dtype)
                value, gradient = exact(kind, student[:, :vocab], teacher[:, :vocab], temperature)
                if vocab == 1:  # certainty: both are 0
                    value, gradient = value + 1, gradient + 1
                for inplace in (False, True):
                    leaf = student.clone().requires_grad_()
                    given = leaf * 1 if inplace else leaf
                    loss = vocabulary_parallel_loss(
                        given, teacher, group, vocab_size=vocab, loss=LossConfig(kind, temperature), inplace=inplace
                    )
                    loss.total.sum().backward()
                    assert leaf.grad is not None
                    assert not leaf.grad[:, vocab:].any()
                    certain = float(vocab == 1)
                    found[f"{name} {kind} V={vocab} T={temperature} inplace={inplace}"] = {
                        "value": error(loss.total.detach() + certain, value),
                        "gradient": error(leaf.grad[:, :vocab].double() + certain, gradient),
                    }
    return found


@dataclasses.dataclass(frozen=True)
class Half(Columns):
    """One of two ranks; what the other one adds to the reductions is known beforehand."""

    maxima: Any = None  # [2, n] of the other rank
    sums: Any = None  # its three sums at maxima that it is given

    def largest(self, local: torch.Tensor) -> torch.Tensor:
        top = local.copy_(torch.maximum(local, self.maxima.to(local.dtype)))
        self.buffers["top"] = top.clone()
        return top

    def total(self, *sums: torch.Tensor) -> torch.Tensor:
        return torch.stack(sums) + self.sums(self.buffers["top"].double()).to(sums[0].dtype)


def of_two_ranks(group: Any) -> dict[str, dict[str, float]]:
    """Each half computes the whole's value and its own columns' gradient; also beside a rank of padding alone."""
    found = {}
    for kind in KINDS:
        for name, dtype in DTYPES.items():
            for cut in (500, 1001, 0):
                student, teacher = logits(1001, dtype, seed=1)
                value, gradient = exact(kind, student, teacher, 1.0)
                for mine, other in ((slice(0, cut), slice(cut, None)), (slice(cut, None), slice(0, cut))):
                    p, q = teacher[:, other].double(), student[:, other].double()
                    lowest = torch.full((2, TOKENS), torch.finfo(torch.float32).min, dtype=torch.float64)
                    maxima = torch.stack([p.amax(-1), q.amax(-1)]) if p.shape[-1] else lowest

                    def sums(
                        top: torch.Tensor, p: torch.Tensor = p, q: torch.Tensor = q, kind: str = kind
                    ) -> torch.Tensor:
                        exps = (p - top[0][:, None]).exp(), (q - top[1][:, None]).exp()
                        cross = exps[0] * (p - q) if kind == "forward_kl" else exps[1] * (q - p)
                        return torch.stack([exps[0].sum(-1), exps[1].sum(-1), cross.sum(-1)])

                    z = student[:, mine].contiguous()
                    columns = Half(group, mine.start, z.shape[-1], maxima=maxima, sums=sums)
                    if kind == "forward_kl":
                        taken: torch.Tensor = torch.empty_like(z)
                        loss = kernels.forward_kl(teacher[:, mine], z, columns, temperature=1.0, out=taken)
                    else:
                        loss, taken = kernels.reverse_kl(teacher[:, mine], z, columns)
                    found[f"{name} {kind} columns {mine.start} to {mine.stop or 1001}"] = {
                        "value": error(loss, value),
                        "gradient": error(taken, gradient[:, mine]) if z.numel() else 0.0,
                    }
    return found


def against_plain(group: Any) -> dict[str, dict[str, float]]:
    """The same call with and without Triton, for what surrounds the kernels: labels, common tokens, chunks, masks."""
    found = {}
    vocab, padded = 301, 320
    mask = torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0])
    labels = torch.tensor([0, 5, 300, 17, 4])
    for kind in (*KINDS, "jensen_shannon", "top_k"):
        for label_weight in (0.0, 0.3):
            for common in (None, CommonTokens(290, (3, 150))):
                loss = LossConfig(kind, 1.5, beta=0.3, k=16, label_weight=label_weight)
                for name in ("float32", "bfloat16"):
                    student, teacher = logits(padded, DTYPES[name], seed=2)
                    results = []
                    for setting in ("0", "1"):
                        os.environ[triton_choice.TRITON_VARIABLE] = setting
                        leaf = student.clone().requires_grad_()
                        taken = vocabulary_parallel_loss(
                            leaf, teacher, group, vocab_size=vocab, loss=loss,
                            labels=labels if label_weight else None, common=common,
                        )  # fmt: skip
                        (taken.total * mask).sum().backward()
                        assert leaf.grad is not None
                        assert not leaf.grad[mask == 0].any()
                        results.append((taken.total.detach(), leaf.grad))
                    found[f"{name} {kind} labels={label_weight} common={common is not None}"] = {
                        "value": error(results[1][0], results[0][0]),
                        "gradient": error(results[1][1], results[0][1]),
                    }
    generator = torch.Generator().manual_seed(3)
    hidden, theirs = (torch.randn(TOKENS, 1, 8, generator=generator) for _ in range(2))
    weight, their_weight = (torch.randn(padded, 8, generator=generator) for _ in range(2))
    for kind in KINDS:
        gradients: list[list[torch.Tensor]] = []
        for setting in ("0", "1"):
            os.environ[triton_choice.TRITON_VARIABLE] = setting
            leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            summed = fused_head_loss(
                OutputHead(*leaves), OutputHead(theirs, their_weight), group, vocab_size=vocab, loss=LossConfig(kind),
                token_weights=mask[:, None],
            )  # fmt: skip
            summed.total.backward()
            gradients.append([summed.total.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
        plain, triton = gradients
        found[f"float32 {kind} in chunks"] = {
            "value": error(triton[0], plain[0]),
            "gradient": max(error(a, b) for a, b in zip(triton[1:], plain[1:], strict=True)),
        }
    return found


def counted(calls: dict[str, int], name: str) -> Callable[..., Any]:
    original = getattr(triton_kernels, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return original(*args, **kwargs)

    return call


def main() -> None:
    torch.set_num_threads(1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group("gloo", store=dist.TCPStore("127.0.0.1", port, 1, is_master=True), rank=0, world_size=1)
    group = dist.group.WORLD
    calls = {"statistics": 0, "derivative": 0}
    for name in calls:  # that the plain form did not stand in
        setattr(triton_kernels, name, counted(calls, name))
    parts: dict[str, Any] = {}
    for part in (against_float64, of_two_ranks, against_plain):
        os.environ[triton_choice.TRITON_VARIABLE] = "1"
        before = dict(calls)
        parts[part.__name__] = part(group)
        parts[f"calls of {part.__name__}"] = {name: calls[name] - before[name] for name in calls}
    json.dump(parts, sys.stdout)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
