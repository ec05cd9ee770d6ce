"""One step of supervised fine-tuning with NeMo-Aligner."""

from __future__ import annotations

import torch
import torch.distributed as dist

from nemo_minitron.alignment.batches import Sample
from nemo_minitron.alignment.export import trained_checkpoint
from nemo_minitron.alignment.sft import train_sft
from nemo_minitron.config import AlignmentSchedule
from nemo_minitron.doctor.checks import Context
from nemo_minitron.doctor.checks.distill import update_of
from nemo_minitron.runtime.files import read_json_lines

__all__ = ["run"]


def run(context: Context) -> dict[str, torch.Tensor]:
    """``loss`` of the step, ``validation_loss`` before and after it, ``update`` of all weights together."""
    material, directory = context.material, context.scratch / "sft"
    batch = material.global_batch_size
    model = material.teacher
    last = train_sft(
        model,
        _samples(context, batch, seed=6),
        _samples(context, batch, seed=7),
        layout=context.layout,
        schedule=AlignmentSchedule(
            steps=1,
            micro_batch_size=1,
            global_batch_size=batch,
            lr=1e-2,
            min_lr=1e-2,
            warmup_steps=0,
            validate_every=1,
            save_every=1,
            precision=context.trainer_precision,
        ),
        directory=directory,
        max_length=material.sequence_length,
        resume=False,
    )
    if dist.get_rank() != 0:
        return {}
    lines = read_json_lines(directory / "metrics.jsonl")
    return {
        "loss": torch.tensor([line["loss"] for line in lines if "split" not in line]),
        "validation_loss": torch.tensor([line["loss"] for line in lines if "split" in line]),
        "update": update_of(trained_checkpoint(model, last, tokenizer=None, lineage={}), model),
    }


def _samples(context: Context, count: int, *, seed: int) -> list[Sample]:
    """Random conversations of different lengths, of which the second half is trained."""
    samples = []
    for index, row in enumerate(context.material.blocks(count, seed=seed).tolist()):
        ids = row[: len(row) - index % 5]
        samples.append(Sample(ids, [place >= len(ids) // 2 for place in range(len(ids))], (len(ids),)))
    return samples
