"""A teacher that learns the labels while it teaches: against plain torch, over layouts, through a resume."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import tiny_checkpoint
from support.distributed import run_distributed

SEQUENCE, STEPS, BATCH = 24, 6, 4
VALUES = ("kl", "lm_loss", "grad_norm", "teacher_lm_loss", "teacher_lr", "teacher_grad_norm")


def blocks() -> torch.Tensor:
    return torch.randint(6, 131, (STEPS * BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))


def train(models: str, out: str, layout: dict[str, Any], stop_at: int | None = None) -> str:
    """Distil with the correction; after ``stop_at`` steps a signal comes. Returns the error's name, or ""."""
    import os

    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.config import CorrectionConfig
    from nemo_minitron.distillation import callbacks
    from nemo_minitron.distillation.recipe import Schedule, distill
    from nemo_minitron.errors import MinitronError
    from nemo_minitron.runtime.groups import ParallelLayout

    advance = callbacks.ProgressBar.on_train_batch_end

    def interrupted(self: Any, trainer: Any, *arguments: Any) -> None:
        advance(self, trainer, *arguments)
        if trainer.global_step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    callbacks.ProgressBar.on_train_batch_end = interrupted  # type: ignore[method-assign]
    try:
        distill(
            open_checkpoint(Path(models) / "student"),
            open_checkpoint(Path(models) / "teacher"),
            blocks(),
            blocks()[:BATCH],
            layout=ParallelLayout(**layout),
            schedule=Schedule(
                steps=STEPS, micro_batch_size=2, global_batch_size=BATCH, lr=1e-3, min_lr=1e-4, warmup_steps=2,
                validate_every=3, validation_batches=1, save_every=100,
            ),
            directory=Path(out),
            correction=CorrectionConfig(lr=5e-4, min_lr=5e-5),
        )  # fmt: skip
    except MinitronError as error:
        return type(error).__name__
    finally:
        callbacks.ProgressBar.on_train_batch_end = advance  # type: ignore[method-assign]
    return ""


def straight_and_resumed(models: str, out: str, layout: dict[str, Any]) -> list[str]:
    found = [train(models, f"{out}/straight", layout)]
    if layout:
        return found
    return [*found, train(models, f"{out}/resumed", layout, 4), train(models, f"{out}/resumed", layout)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embeddings: under pipeline parallelism first and last stage share the teacher's gradient of them."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 72}
    tiny_checkpoint(folder / "teacher", tied=True, num_hidden_layers=4, seed=1, **sizes)
    tiny_checkpoint(folder / "student", tied=True, num_hidden_layers=3, seed=2, **{**sizes, "hidden_size": 32})
    return folder


@pytest.fixture(scope="module")
def one_process(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one")
    arguments: dict[str, Any] = {"models": str(models), "out": str(out), "layout": {}}
    assert run_distributed(straight_and_resumed, 1, out, timeout=250, **arguments) == [["", "PreemptedError", ""]]
    return out


def lines(directory: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("split", "step", *VALUES) if name in line} for line in found]


@pytest.mark.slow
def test_both_equal_plain_torch_loops(models: Path, one_process: Path) -> None:
    """The student learns from the teacher as it was before the step, and the teacher from the step's labels."""
    from transformers import AutoModelForCausalLM

    from nemo_minitron.distillation.losses import forward_kl

    student, teacher = (AutoModelForCausalLM.from_pretrained(models / which) for which in ("student", "teacher"))
    optimizers = [
        torch.optim.AdamW(
            [
                {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
                {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
            eps=1e-8,
        )
        for model in (student, teacher)
    ]
    measured = [json.loads(line) for line in (one_process / "straight/metrics.jsonl").read_text().splitlines()]
    for index, line in enumerate(line for line in measured if "split" not in line):
        batch = blocks()[index * BATCH : (index + 1) * BATCH]
        ours, theirs = student(batch[:, :-1]).logits, teacher(batch[:, :-1]).logits
        kl = forward_kl(ours, theirs.detach()).mean()
        lm = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), batch[:, 1:].flatten())
        norms = []
        for optimizer, model, loss, lr in zip(
            optimizers, (student, teacher), (kl, lm), (line["lr"], line["teacher_lr"]), strict=True
        ):
            optimizer.zero_grad()
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
            for parameters in optimizer.param_groups:
                parameters["lr"] = lr
            optimizer.step()
        assert line["teacher_lr"] == pytest.approx(line["lr"] / 2)
        assert (line["kl"], line["teacher_lm_loss"]) == pytest.approx((kl.item(), lm.item()), rel=2e-5)
        assert (line["grad_norm"], line["teacher_grad_norm"]) == pytest.approx(norms, rel=2e-4)
        if line["step"] == STEPS:
            with torch.no_grad():
                held_out = blocks()[:BATCH, :-1]
                expected = forward_kl(student(held_out).logits, teacher(held_out).logits).mean().item()
            assert measured[-1]["kl"] == pytest.approx(expected, rel=2e-5)


@pytest.mark.slow
def test_a_resume_is_exact(one_process: Path) -> None:
    """The teacher's weights, its optimizer and its learning rate are in the checkpoint."""
    assert lines(one_process / "resumed") == lines(one_process / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}], ids=str)
def test_layouts_equal_one_process(layout: dict[str, Any], models: Path, one_process: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"models": str(models), "out": str(tmp_path), "layout": layout}
    run_distributed(straight_and_resumed, 2, tmp_path, timeout=250, **arguments)
    found, expected = lines(tmp_path / "straight"), lines(one_process / "straight")
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in VALUES:
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (theirs["step"], name)
