"""Trainings of models with scaled RoPE: labels and distillation against plain torch loops of transformers' models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import hf_logits, tiny_checkpoint
from support.distributed import run_distributed
from support.training import blocks, measured, train

pytestmark = pytest.mark.slow

SHORT: dict[str, Any] = {"count": 12, "steps": 3, "validate_every": 3}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 2.0}


def trainings(models: str, out: str) -> None:
    """The student is written as each stage writes it, and read again."""
    layout = {"tensor": 2}
    assert train(models, f"{out}/labels", alone=True, layout=layout, **SHORT) == ""
    assert train(models, f"{out}/distilled", layout=layout, **SHORT) == ""


def test_trainings_equal_plain_torch_loops(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
    from nemo_minitron.distillation.losses.reference import forward_kl

    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 32}
    tiny_checkpoint(tmp_path / "teacher", seed=1, rope_scaling=YARN, **sizes)
    student = {"hidden_size": 36, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    tiny_checkpoint(tmp_path / "hf-student", seed=2, **sizes, **student)
    write_checkpoint(open_checkpoint(tmp_path / "hf-student"), tmp_path / "student", "nemo2")
    run_distributed(trainings, 2, tmp_path, timeout=280, models=str(tmp_path), out=str(tmp_path))

    teacher, student = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("teacher", "hf-student"))
    data = blocks(12)
    with torch.no_grad():
        target = teacher(data[:4, :-1]).logits
        kl = forward_kl(student(data[:4, :-1]).logits, target).mean()
    loss = torch.nn.functional.cross_entropy(teacher(data[:4, :-1]).logits.flatten(0, 1), data[:4, 1:].flatten())
    loss.backward()
    norm = torch.nn.utils.get_total_norm([part.grad for part in teacher.parameters()])
    labels, distilled = measured(tmp_path / "labels")[0], measured(tmp_path / "distilled")[0]
    assert labels["lm_loss"] == pytest.approx(loss.item(), rel=2e-5)
    assert labels["grad_norm"] == pytest.approx(norm.item(), rel=2e-4)
    assert distilled["kl"] == pytest.approx(kl.item(), rel=2e-5)

    # what NeMo saved names the class that computes it, and goes on to Hugging Face
    saved = tmp_path / "labels/checkpoints/step=2-last"
    assert "nemo2.scaled.ScaledLlamaConfig" in (saved / "context/model.yaml").read_text()
    trained = open_checkpoint(saved)
    assert trained.architecture.rotary_scaling == YARN
    write_checkpoint(trained, tmp_path / "exported", "hf")
    with torch.no_grad():
        after = hf_logits(tmp_path / "exported", data[:4, :-1])[..., :131]
    loss = torch.nn.functional.cross_entropy(after.flatten(0, 1), data[:4, 1:].flatten())
    validated = [json.loads(line) for line in (tmp_path / "labels/metrics.jsonl").read_text().splitlines()][-1]
    assert validated["lm_loss"] == pytest.approx(loss.item(), rel=2e-5)
