"""Distillation on blocks of several documents, over two pipeline stages, against each document alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.checkpoints import tiny_checkpoint
from support.distributed import run_distributed

SEQUENCE, BATCH = 15, 2


def packed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, segments and labels to be learned of four blocks, two of them filled up."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(6, 131, (4, SEQUENCE + 1), generator=generator)
    rows = [[5, 7, 4], [3, 10], [9, 2, 5], [8, 5]]
    segments = torch.tensor(
        [[n for n, size in enumerate(row) for _ in range(size)] + [-1] * (SEQUENCE + 1 - sum(row)) for row in rows]
    )
    learned = torch.rand(4, SEQUENCE, generator=generator) < 0.7
    return tokens, segments.to(torch.int32), learned


def distil_case(models: str, out: str) -> float:
    """Two steps of one batch each, and a validation on all blocks; then the student's held-out loss."""
    from nemo_minitron.checkpoints import load_into, open_checkpoint
    from nemo_minitron.data import Blocks
    from nemo_minitron.distillation.recipe import distill
    from nemo_minitron.distillation.training.loop import Schedule
    from nemo_minitron.evaluation import held_out_loss
    from nemo_minitron.runtime.groups import ParallelLayout, current
    from nemo_minitron.runtime.model import build_model

    tokens, segments, learned = packed()
    blocks = Blocks(tokens, torch.zeros(4, dtype=torch.int64), ("text",), segments, learned)
    student, layout = open_checkpoint(Path(models) / "student"), ParallelLayout(pipeline=2)
    distill(
        student,
        open_checkpoint(Path(models) / "teacher"),
        blocks,
        blocks,
        layout=layout,
        schedule=Schedule(
            steps=2, micro_batch_size=1, global_batch_size=BATCH, lr=0.0, min_lr=0.0, warmup_steps=0,
            validate_every=2, validation_batches=2, save_every=2,
        ),
        directory=Path(out),
    )  # fmt: skip
    groups = current(layout)
    chunks = build_model(student.shape, student.architecture, groups)
    load_into(chunks, student, groups)
    return held_out_loss(chunks, groups, blocks, 2, vocab_size=student.shape.vocab_size).overall.loss


@pytest.mark.slow
def test_a_packed_block_teaches_what_its_documents_teach_alone(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for seed, which in enumerate(("teacher", "student")):
        tiny_checkpoint(tmp_path / which, num_hidden_layers=2, seed=seed)
    held_out = run_distributed(distil_case, 2, tmp_path, models=str(tmp_path), out=str(tmp_path / "out"))
    measured = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in measured if "split" not in line]
    (validation,) = [line for line in measured if line.get("split") == "validation"]

    student, teacher = (AutoModelForCausalLM.from_pretrained(tmp_path / which) for which in ("student", "teacher"))
    kl, lm = torch.zeros(4, SEQUENCE), torch.zeros(4, SEQUENCE)
    counts = torch.zeros(4, SEQUENCE, dtype=torch.bool)
    tokens, segments, learned = packed()
    with torch.no_grad():
        for row in range(4):
            for number in range(int(segments[row].max()) + 1):
                places = (segments[row] == number).nonzero().flatten()
                document = tokens[row, places][None]
                ours, theirs = (model(document).logits[0, :-1].log_softmax(-1) for model in (student, teacher))
                kl[row, places[:-1]] = (theirs.exp() * (theirs - ours)).sum(-1)
                lm[row, places[:-1]] = -ours.gather(-1, document[0, 1:, None])[:, 0]
                counts[row, places[:-1]] = learned[row, places[:-1]]
    batches = [slice(0, BATCH), slice(BATCH, 2 * BATCH)]
    for mine, line in zip(batches, steps, strict=True):
        assert line["kl"] == pytest.approx(float(kl[mine][counts[mine]].mean()), rel=2e-5)
    assert held_out == pytest.approx([float(lm[counts].mean())] * 2, rel=2e-5)
    for name, values in (("kl", kl), ("lm_loss", lm)):
        by_token = float(values[counts].mean())
        by_batch = sum(float(values[mine][counts[mine]].mean()) for mine in batches) / 2
        assert validation[name] in (pytest.approx(by_token, rel=2e-5), pytest.approx(by_batch, rel=2e-5))
