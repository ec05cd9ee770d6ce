"""The logit loss of docs/extending.md, from a package outside: under TP 2, in a distillation, on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import tiny_checkpoint
from support.distributed import next_port, run_distributed
from support.extending import install_example

VOCABULARY, COLUMNS, LABEL_WEIGHT = 67, 72, 0.3
BATCH, SEQUENCE, STEPS = 2, 16, 2


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages that has the example."""
    folder = tmp_path_factory.mktemp("site-packages")
    install_example("A logit loss", folder)
    return folder


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``[n, V]`` logits of student and teacher, with columns of padding, and labels."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 11, COLUMNS, generator=generator, dtype=torch.float64)
    return student, teacher, torch.randint(VOCABULARY, (11,), generator=generator)


def blocks() -> torch.Tensor:
    return torch.randint(6, 131, (STEPS * BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))


def ranks(models: str, out: str) -> dict[str, Any]:
    """Value and gradient of this rank's columns, then a short distillation."""
    import torch.distributed as dist

    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.config import LossConfig
    from nemo_minitron.distillation.losses import vocabulary_parallel
    from nemo_minitron.distillation.losses.table import LOGIT_LOSSES
    from nemo_minitron.distillation.recipe import Schedule, distill
    from nemo_minitron.runtime.groups import ParallelLayout

    dist.init_process_group("gloo")
    loss = LossConfig("hellinger", temperature=2.0, label_weight=LABEL_WEIGHT)
    assert loss.faults() == []
    vocabulary_parallel.CHUNK_BYTES["cpu"] = 1000  # several chunks
    student, teacher, labels = inputs()
    mine = slice(dist.get_rank() * COLUMNS // 2, (dist.get_rank() + 1) * COLUMNS // 2)
    leaf = student[:, mine].clone().requires_grad_()
    taken = vocabulary_parallel.vocabulary_parallel_loss(
        leaf, teacher[:, mine], dist.group.WORLD, vocab_size=VOCABULARY, loss=loss, labels=labels
    )
    taken.total.sum().backward()
    plain = student[:, :VOCABULARY].clone().requires_grad_()
    expected = LOGIT_LOSSES["hellinger"].expected(plain, teacher[:, :VOCABULARY], loss)
    cross_entropy = torch.nn.functional.cross_entropy(plain, labels, reduction="none")
    ((1 - LABEL_WEIGHT) * expected + LABEL_WEIGHT * cross_entropy).sum().backward()
    dist.destroy_process_group()
    next_port()

    distill(
        open_checkpoint(Path(models) / "student"),
        open_checkpoint(Path(models) / "teacher"),
        blocks(),
        blocks()[:BATCH],
        layout=ParallelLayout(tensor=2),
        schedule=Schedule(
            steps=STEPS, micro_batch_size=1, global_batch_size=BATCH, lr=1e-3, min_lr=1e-4, warmup_steps=0,
            validate_every=STEPS, validation_batches=1, save_every=STEPS,
        ),
        loss=LossConfig("hellinger"),
        directory=Path(out),
    )  # fmt: skip
    return {
        "values": (taken.divergence, expected.detach()),
        "gradients": (leaf.grad, torch.nn.functional.pad(plain.grad, (0, COLUMNS - VOCABULARY))[:, mine]),
    }


@pytest.mark.slow
def test_two_ranks_compute_it_and_a_student_learns_by_it(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    for seed, which in enumerate(("teacher", "student")):
        tiny_checkpoint(tmp_path / which, seed=seed)
    monkeypatch.setenv("PYTHONPATH", str(package), prepend=os.pathsep)
    for rank in run_distributed(ranks, 2, tmp_path, models=str(tmp_path), out=str(tmp_path / "out")):
        for ours, reference in rank.values():
            torch.testing.assert_close(ours, reference, rtol=1e-11, atol=1e-13)

    student, teacher = (AutoModelForCausalLM.from_pretrained(tmp_path / which) for which in ("student", "teacher"))
    tokens = blocks()[:BATCH, :-1]
    monkeypatch.syspath_prepend(package)
    import hellinger  # the module of the page

    loss = hellinger.reference(student(tokens).logits, teacher(tokens).logits).mean()
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in student.parameters()]).norm()
    first = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["kl"] == pytest.approx(loss.item(), rel=2e-5)
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=2e-4)


def test_the_command_line_knows_it_where_it_is_installed(package: Path, tmp_path: Path) -> None:
    settings = ["distill", "loss.kind=hellinger", f"output={tmp_path}/out"]
    command = [sys.executable, "-m", "nemo_minitron", "distill"]

    def answer(*words: str, **environment: str) -> str:
        done = subprocess.run(
            [*command, *words], capture_output=True, text=True, env=os.environ | {"COLUMNS": "300"} | environment
        )
        return done.stdout + done.stderr

    without = answer("--dry-run", *settings)
    assert "loss.kind=hellinger: must be one of forward_kl, reverse_kl, jensen_shannon, top_k\n" in without
    installed = answer("--dry-run", *settings, PYTHONPATH=str(package))
    assert "loss.kind" not in installed and "metrics of each step" in installed
    assert '"hellinger"' in answer("--help", PYTHONPATH=str(package))
