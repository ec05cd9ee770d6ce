"""The fused output layer and loss against the unfused in float64, values and gradients, at TP 1, 2 and 4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.distributed import run_distributed

from nemo_minitron.config import LossConfig
from nemo_minitron.distillation.losses import fused_head, vocabulary_parallel
from nemo_minitron.distillation.losses.common import CommonTokens
from nemo_minitron.distillation.losses.fused_head import OutputHead, fused_head_loss
from nemo_minitron.distillation.losses.table import LOGIT_LOSSES
from nemo_minitron.distillation.losses.vocabulary_parallel import vocabulary_parallel_top_k

S, B, H, H_T, V = 8, 2, 12, 20, 45
LOSSES = [
    LossConfig("forward_kl"),
    LossConfig("forward_kl", 2.5),
    LossConfig("reverse_kl", 0.7),
    LossConfig("jensen_shannon", 1.5, beta=0.3),
    LossConfig("top_k", 2.0, k=5),
    LossConfig("top_k", k=V),
    LossConfig("forward_kl", label_weight=0.3),
    LossConfig("reverse_kl", 3.0, label_weight=0.5),
    LossConfig("forward_kl", label_weight=1.0),
]


def whole(seed: int, rows: int, width: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and output layer."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(S, B, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(64, width, generator=generator, dtype=torch.float64)[:columns].clone()
    weight[rows:] = 7.0  # padding, which takes no part
    return hidden, weight


def expected(
    loss: LossConfig | None, common: CommonTokens | None, labels: torch.Tensor, weights: torch.Tensor, rows: int
) -> dict[str, torch.Tensor]:
    """By plain autograd on whole logits of one process; tied weights get the gradient of an embedding too."""
    hidden, weight = (tensor.requires_grad_() for tensor in whole(1, V, H, rows))
    logits = (hidden @ weight.T)[..., :V]
    cross_entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    values = cross_entropy.view(S, B)
    if loss is not None:
        teacher_rows = V if common is None else common.size + 3
        teacher_hidden, teacher_weight = whole(2, teacher_rows, H_T, teacher_rows)
        teacher = teacher_hidden @ teacher_weight.T
        student = logits
        if common is not None:
            kept = [token for token in range(common.size) if token not in common.left_out]
            teacher, student = teacher[..., kept], logits[..., kept]
        settings = LossConfig(loss.kind, loss.temperature, loss.beta, min(loss.k, student.shape[-1]))
        over = LOGIT_LOSSES[loss.kind].over_all
        if over is not None and loss.k >= student.shape[-1]:
            settings.kind = over
        divergence = LOGIT_LOSSES[settings.kind].expected(student, teacher, settings)
        values = (1 - loss.label_weight) * divergence + loss.label_weight * values
    total = (values * weights).sum()
    (3.0 * total + weight[:5].sum()).backward()  # a scaled loss, and the other use of tied weights
    assert hidden.grad is not None
    assert weight.grad is not None
    return {"total": total.detach(), "values": values.detach(), "hidden": hidden.grad, "weight": weight.grad}


def _differences() -> dict[str, float]:
    """The largest difference of each case, on this rank."""
    from megatron.core import parallel_state

    world = int(__import__("os").environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    group, rank = parallel_state.get_tensor_model_parallel_group(), dist.get_rank()
    rows = 4 * -(-V // 4)  # padded, so that every world divides it
    labels = torch.randint(0, V, (S, B), generator=torch.Generator().manual_seed(3))
    weights = torch.rand(S, B, generator=torch.Generator().manual_seed(4), dtype=torch.float64).round(decimals=1)
    weights[2:4] = 0
    found: dict[str, float] = {}

    def mine(tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        return tensor.chunk(world, dim)[rank].clone()

    def case(
        name: str, loss: LossConfig | None, *, common: CommonTokens | None = None, scattered: bool = False,
        teacher: str = "head", chunk: int = 3, labelled: bool | None = None,
    ) -> None:  # fmt: skip
        fused_head.HEAD_BYTES = {"cpu": chunk * rows // world * 8}
        vocabulary_parallel.CHUNK_BYTES = {"cpu": 2 * rows // world * 8}
        hidden, weight = whole(1, V, H, rows)
        hidden, weight = (mine(hidden) if scattered else hidden).requires_grad_(), mine(weight).requires_grad_()
        theirs: Any = None
        if loss is not None:
            size = V if common is None else common.size + 3
            padded = 4 * -(-size // 4)
            states, matrix = whole(2, size, H_T, padded)
            matrix = mine(matrix)
            if teacher == "head":
                theirs = OutputHead(mine(states) if scattered else states, matrix, scattered)
            else:
                theirs = states @ matrix.T
            if teacher == "top":
                theirs = vocabulary_parallel_top_k(theirs, group, vocab_size=V, k=loss.k, temperature=loss.temperature)
        with_labels = (loss is None or loss.label_weight > 0) if labelled is None else labelled
        result = fused_head_loss(
            OutputHead(hidden, weight, scattered), theirs, group, vocab_size=V, loss=loss, token_weights=weights,
            labels=labels if with_labels else None, common=common,
        )  # fmt: skip
        (3.0 * result.total + (weight[:5].sum() if rank == 0 else 0.0)).backward()
        exact = expected(loss, common, labels, weights, rows)
        assert hidden.grad is not None
        assert weight.grad is not None
        pairs = [
            (result.total.detach(), exact["total"]),
            (result.tokens.total, exact["values"]),
            (hidden.grad, mine(exact["hidden"]) if scattered else exact["hidden"]),
            (weight.grad, mine(exact["weight"])),
        ]
        found[name] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)

    for loss in LOSSES:
        name = f"{loss.kind} T={loss.temperature} k={loss.k} w={loss.label_weight}"
        case(name, loss)
    case("cross-entropy", None)
    case("labels that are only measured", LossConfig("forward_kl"), labelled=True)
    case("one chunk", LossConfig("forward_kl"), chunk=99)
    case("a token a chunk", LossConfig("forward_kl", label_weight=0.5), chunk=1)
    case("logits of the teacher", LossConfig("reverse_kl"), teacher="logits")
    case("likeliest tokens", LossConfig("top_k", 1.5, k=6), teacher="top")
    case("scattered", LossConfig("jensen_shannon"), scattered=True)
    case("common tokens", LossConfig("forward_kl", 2.0), common=CommonTokens(40, (3, 17)))
    case("common tokens and labels", LossConfig("top_k", k=7, label_weight=0.2), common=CommonTokens(31, (0,)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_fused_equals_unfused(tmp_path: Path, world: int) -> None:
    for found in run_distributed(_differences, world, tmp_path):
        assert len(found) == len(LOSSES) + 9
        assert {name: value for name, value in found.items() if not value < 1e-12} == {}
