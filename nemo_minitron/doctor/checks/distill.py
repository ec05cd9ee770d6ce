"""Two steps of a distillation: one step, a checkpoint, and the second step from it. The reference does not stop."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.model_record import write_model_record
from nemo_minitron.distillation.recipe import Schedule, distill
from nemo_minitron.doctor.checks import Context
from nemo_minitron.runtime.files import read_json_lines

__all__ = ["reference", "run", "update_of"]

STEPS = 2


def run(context: Context) -> dict[str, torch.Tensor]:
    """``kl`` and ``grad_norm`` of each step, ``validation_kl`` after each, ``update`` of all weights together."""
    return _trained(context, stops=(1, STEPS))


def reference(context: Context) -> dict[str, torch.Tensor]:
    """The same steps without a stop."""
    return _trained(context, stops=(STEPS,))


def _trained(context: Context, *, stops: tuple[int, ...]) -> dict[str, torch.Tensor]:
    material, directory = context.material, context.scratch / "distill"
    batch = material.global_batch_size
    train, validation = material.blocks(STEPS * batch, seed=4), material.blocks(batch, seed=5)
    student = material.student
    last = None
    for steps in stops:
        if steps < stops[-1]:
            tokens = train
        else:
            # What a training that goes on has behind it must not be read again: other tokens would change the result.
            tokens = train.clone()
            tokens[: batch * (stops[-2] if len(stops) > 1 else 0)] = 5
        unset_num_microbatches_calculator()  # of an earlier training in this process
        # The learning rate is constant, so that the number of steps changes nothing but where the training ends.
        schedule = Schedule(
            steps=steps,
            micro_batch_size=1,
            global_batch_size=batch,
            lr=1e-2,
            min_lr=1e-2,
            warmup_steps=0,
            validate_every=1,
            validation_batches=1,
            save_every=1,
            precision=context.trainer_precision,
        )
        last = distill(
            student, material.teacher, tokens, validation,
            layout=context.layout, schedule=schedule, directory=directory,
        ).last  # fmt: skip
        # Rank 0 removes NeMo's mark of an unfinished checkpoint; a rank that began again before would remove both.
        dist.barrier()
    assert last is not None
    if dist.get_rank() != 0:
        return {}
    lines = read_json_lines(directory / "metrics.jsonl")
    steps_made = [line for line in lines if "split" not in line]
    # Of a step that was validated before the stop and again after it, the last.
    validated = {line["step"]: line["kl"] for line in lines if "split" in line}
    return {
        "kl": torch.tensor([line["kl"] for line in steps_made]),
        "grad_norm": torch.tensor([line["grad_norm"] for line in steps_made]),
        "validation_kl": torch.tensor([validated[step] for step in sorted(validated)]),
        "update": update_of(_saved(student, last, context), student),
    }


def _saved(student: Checkpoint, last: Path, context: Context) -> Checkpoint:
    """The training's own checkpoint, opened like any other."""
    write_model_record(student, last, dtype=context.precision, form="nemo2")
    return open_checkpoint(last)


def update_of(trained: Checkpoint, initial: Checkpoint) -> torch.Tensor:
    """The change of the weights by training, all tensors concatenated."""
    return torch.cat(
        [
            (trained.weights.tensor(name).float() - initial.weights.tensor(name).float()).flatten()
            for name in initial.weights.names()
        ]
    )
