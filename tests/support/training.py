"""Trainings of tiny models for the distributed tests; called in their processes, several one after another."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from support.checkpoints import tiny_checkpoint

__all__ = ["blocks", "make_models", "measured", "train"]

SEQUENCE = 32


def make_models(folder: Path) -> None:
    """Teacher and thinner student with tied embeddings: first and last pipeline stage share their gradient."""
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 8, "intermediate_size": 72}
    tiny_checkpoint(folder / "teacher", tied=True, num_hidden_layers=5, seed=1, **sizes)
    tiny_checkpoint(folder / "student", tied=True, num_hidden_layers=4, seed=2, **{**sizes, "hidden_size": 36})


def blocks(count: int) -> torch.Tensor:
    """Random token blocks."""
    return torch.randint(6, 131, (count, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))


def train(
    models: str,
    out: str,
    *,
    count: int,
    layout: dict[str, Any] | None = None,
    at: tuple[int, signal.Signals | None] | None = None,
    alone: bool = False,
    correction: dict[str, float] | None = None,
    intermediate: dict[str, Any] | None = None,
    uneven: bool = False,
    quantize: str | None = None,
    **schedule: Any,
) -> str:
    """Distil, or train the teacher on the labels.

    Args:
        models: folder of "teacher" and "student".
        out: directory of the training.
        count: blocks.
        layout: of both models.
        at: after this step rank 0 dies (None) or gets a signal.
        alone: train the teacher by itself.
        correction, intermediate: of the distillation.
        uneven: some labels do not count, of each block others.
        quantize: train for this quantization, int4 with groups of 32.
        schedule: settings; four sequences a step and the like by default.

    Returns:
        The error, or "".
    """
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.config import CorrectionConfig, IntermediateConfig
    from nemo_minitron.distillation.recipe import Schedule, correct, distill
    from nemo_minitron.distillation.training import metrics
    from nemo_minitron.errors import MinitronError
    from nemo_minitron.quantization import scheme_of
    from nemo_minitron.runtime.groups import ParallelLayout

    settings: dict[str, Any] = {
        "micro_batch_size": 1, "global_batch_size": 4, "lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 2,
        "validation_batches": 1, "save_every": 100,
    }  # fmt: skip
    how: dict[str, Any] = {
        "layout": ParallelLayout(**(layout or {})),
        "schedule": Schedule(**{**settings, **schedule}),
        "directory": Path(out),
        "quantize": None if quantize is None else scheme_of(quantize, 32),
    }
    unset_num_microbatches_calculator()  # of an earlier training in this process
    student, teacher = open_checkpoint(Path(models) / "student"), open_checkpoint(Path(models) / "teacher")
    data: Any = blocks(count), blocks(count)[:4]
    if uneven:
        data = tuple(_masked(part) for part in data)
    advance = metrics.ProgressBar.on_train_batch_end

    def interrupted(self: Any, trainer: Any, *arguments: Any) -> None:
        advance(self, trainer, *arguments)
        if at is not None and trainer.global_step == at[0] and trainer.is_global_zero:
            if at[1] is None:
                os._exit(0)
            os.kill(os.getpid(), at[1])

    metrics.ProgressBar.on_train_batch_end = interrupted  # type: ignore[method-assign]
    try:
        if alone:
            correct(teacher, *data, **how)
        else:
            distill(
                student,
                teacher,
                *data,
                **how,
                correction=CorrectionConfig(**(correction or {})),
                intermediate=IntermediateConfig(**(intermediate or {})),
            )
    except MinitronError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        metrics.ProgressBar.on_train_batch_end = advance  # type: ignore[method-assign]
    return ""


def _masked(tokens: torch.Tensor) -> Any:
    """Of the first block's labels one counts, of the next few more, ...: runs that begin at its end."""
    from nemo_minitron.data.blocks import Blocks

    places, counted = torch.arange(SEQUENCE), 1 + 5 * torch.arange(len(tokens)) % SEQUENCE
    mask = places[None] >= SEQUENCE - counted[:, None]
    return Blocks(tokens, torch.zeros(len(tokens), dtype=torch.int64), ("",), None, mask)


def measured(directory: Path) -> list[dict[str, Any]]:
    """The lines of a training's metrics, without what differs from run to run."""
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    passing = ("tokens_per_second", "tflops", "memory", "seconds")
    return [{name: value for name, value in line.items() if name not in passing} for line in found]
