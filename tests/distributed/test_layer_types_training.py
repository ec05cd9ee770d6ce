"""Trainings of models with sliding windows against plain torch computations of transformers' models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_distributed
from support.families import SIZES, family_model, some_units, windowed_model
from support.training import blocks, measured, train

pytestmark = pytest.mark.slow

SHORT: dict[str, Any] = {"count": 12, "steps": 3, "validate_every": 3}


def tensor_parallel(models: str, out: str) -> None:
    assert train(models, f"{out}/tp2", layout={"tensor": 2, "sequence_parallel": True}, **SHORT) == ""
    layout = {"tensor": 2, "sequence_parallel": True}
    assert train(f"{models}/mistral", f"{out}/mistral-tp2", layout=layout, **SHORT) == ""


def pipeline_parallel(models: str, out: str) -> None:
    assert train(models, f"{out}/pp2", layout={"pipeline": 2}, recompute="full", **SHORT) == ""
    assert train(models, f"{out}/labels", alone=True, layout={"pipeline": 2}, **SHORT) == ""


def test_trainings_equal_plain_torch(tmp_path: Path) -> None:
    """The student keeps layers whose types no pattern of NeMo's gives, and a part of every width."""
    from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
    from nemo_minitron.checkpoints.formats import FORMATS
    from nemo_minitron.checkpoints.formats.huggingface.loader import hf_logits
    from nemo_minitron.distillation.losses.reference import forward_kl
    from nemo_minitron.pruning import prune_weights

    teacher = open_checkpoint(family_model("gemma3", tmp_path / "teacher"))
    student = prune_weights(teacher, dataclasses.replace(some_units(teacher.shape), layers=(1, 2)))
    write_checkpoint(student, tmp_path / "student", "nemo2")
    written = write_checkpoint(student, tmp_path / "hf-student", "hf")
    windowed = open_checkpoint(windowed_model(tmp_path / "mistral/teacher"))
    fewer = prune_weights(windowed, some_units(windowed.shape))
    write_checkpoint(fewer, tmp_path / "mistral/student", "nemo2")
    write_checkpoint(fewer, tmp_path / "mistral/hf-student", "hf")
    for trainings in (tensor_parallel, pipeline_parallel):  # NeMo's layout is one for the life of a process
        run_distributed(trainings, 2, tmp_path, timeout=280, models=str(tmp_path), out=str(tmp_path))

    data = blocks(12)
    assert data.shape[1] - 1 > written.architecture.sliding_window
    with torch.no_grad():
        target, ours = (hf_logits(tmp_path / name, data[:4, :-1], torch.float32) for name in ("teacher", "hf-student"))
        kl = forward_kl(ours, target).mean()
        loss = torch.nn.functional.cross_entropy(target.flatten(0, 1), data[:4, 1:].flatten())
    for layout in ("tp2", "pp2"):
        assert measured(tmp_path / layout)[0]["kl"] == pytest.approx(kl.item(), rel=2e-5), layout
    assert measured(tmp_path / "labels")[0]["lm_loss"] == pytest.approx(loss.item(), rel=2e-5)
    norms = [measured(tmp_path / layout)[0]["grad_norm"] for layout in ("tp2", "pp2")]
    assert norms[0] == pytest.approx(norms[1], rel=2e-4)

    saved = tmp_path / "tp2/checkpoints/step=2-last"
    assert "nemo2.listed.ListedGemma3Config1B" in (saved / "context/model.yaml").read_text()
    trained = open_checkpoint(saved)
    assert trained.architecture.layer_types == student.architecture.layer_types
    assert (
        "layers follow no such pattern (Fs:"
        in FORMATS["nemo2"].refuses(trained.shape, trained.architecture, export=True)[0]
    )
    assert FORMATS["nemo2"].refuses(trained.shape, trained.architecture) == []
    write_checkpoint(trained, tmp_path / "exported", "hf")
    with torch.no_grad():
        after = hf_logits(tmp_path / "exported", data[:4, :-1], torch.float32)[..., : SIZES["vocab_size"]]
        divergence = forward_kl(after, target).mean()
    validated = [json.loads(line) for line in (tmp_path / "tp2/metrics.jsonl").read_text().splitlines()][-1]
    assert validated["kl"] == pytest.approx(divergence.item(), rel=2e-5)
    # a model whose types follow a pattern is NeMo's own
    plain = (tmp_path / "labels/checkpoints/step=2-last/context/model.yaml").read_text()
    assert "gemma3.Gemma3Config1B" in plain
    assert "listed" not in plain

    # Mistral: every layer slides, in NeMo's own class
    with torch.no_grad():
        target, ours = (
            hf_logits(tmp_path / "mistral" / name, data[:4, :-1], torch.float32) for name in ("teacher", "hf-student")
        )
    kl = forward_kl(ours, target).mean()
    assert measured(tmp_path / "mistral-tp2")[0]["kl"] == pytest.approx(kl.item(), rel=2e-5)
    saved = tmp_path / "mistral-tp2/checkpoints/step=2-last"
    assert "mistral.MistralConfig7B" in (saved / "context/model.yaml").read_text()
    trained = open_checkpoint(saved)
    assert (trained.architecture.layer_types, trained.architecture.sliding_window) == (("sliding_attention",) * 2, 5)
    write_checkpoint(trained, tmp_path / "mistral/exported", "hf")
    with torch.no_grad():
        after = hf_logits(tmp_path / "mistral/exported", data[:4, :-1], torch.float32)[..., : SIZES["vocab_size"]]
    divergence = forward_kl(after, target).mean()
    validated = [json.loads(line) for line in (tmp_path / "mistral-tp2/metrics.jsonl").read_text().splitlines()][-1]
    assert validated["kl"] == pytest.approx(divergence.item(), rel=2e-5)
