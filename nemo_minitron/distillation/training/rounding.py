"""A student that is trained for a quantization: its rounding, and the ranges of its inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch

from nemo_minitron.distillation.losses.fused_head import without_output_layer
from nemo_minitron.distillation.teachers.frozen import forward_only
from nemo_minitron.errors import CheckpointError
from nemo_minitron.quantization.live import LiveRounding
from nemo_minitron.quantization.ranges import TrainedFor
from nemo_minitron.quantization.schemes import Scheme

if TYPE_CHECKING:
    from nemo.lightning.megatron_parallel import MegatronStep

    from nemo_minitron.distillation.training.language_model import TrainedModel

__all__ = ["MeasureRanges", "round_forward", "rounding_of"]


def rounding_of(scheme: Scheme, directory: Path, *, resume: bool) -> LiveRounding:
    """The rounding of a training; one that goes on has the ranges that it began with.

    Raises:
        CheckpointError: if ``directory`` holds those of another quantization.
    """
    before = TrainedFor.read(directory) if resume else None
    if before is not None and (before.quantize, before.group_size) != (scheme.name, scheme.group):
        raise CheckpointError(
            f"{directory}: was trained for quantize={before.quantize} with groups of {before.group_size}; choose "
            "another output"
        )
    return LiveRounding(scheme, None if before is None else before.ranges)


def round_forward(model: TrainedModel, scheme: Scheme | None, directory: Path, *, resume: bool) -> list[MeasureRanges]:
    """Let a model round in its forward passes; returns the callbacks that this needs. None rounds nothing."""
    if scheme is None:
        return []
    model.rounding = rounding_of(scheme, directory, resume=resume)
    return [MeasureRanges(model, directory)]


class MeasureRanges(pl.Callback):
    """Before the first step, runs the student over its micro-batches to measure the ranges of its inputs, and notes
    them in the training's directory. Weights and position are as before.

    Args:
        model: the student, with its rounding.
        directory: of the training.
    """

    def __init__(self, model: TrainedModel, directory: Path) -> None:
        self._model, self._directory = model, directory

    def on_megatron_microbatches_start(self, step: MegatronStep) -> None:
        """NeMo calls it on every rank before the micro-batches of a step are drawn."""
        rounding = self._model.rounding
        assert rounding is not None, "it is a callback of trainings that round"
        if rounding.lacks_ranges:
            items = [next(step.data) for _ in range(step.num_microbatches)]
            step.data = iter(items)
            groups = self._model.groups
            chunks = rounding.chunks
            last = chunks[-1]
            headless = without_output_layer(last) if last.post_process else nullcontext()  # logits are not measured
            with _evaluating(chunks), rounding.measuring(groups), headless, torch.no_grad():
                batches = [item[0] if isinstance(item, tuple) else item for item in items]
                forward_only(chunks, groups, batches, keep=lambda output: output.new_zeros(()))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """The first step has ended, and nothing is saved yet."""
        rounding = self._model.rounding
        assert rounding is not None, "it is a callback of trainings that round"
        if trainer.is_global_zero and TrainedFor.read(self._directory) is None:
            TrainedFor(rounding.scheme.name, rounding.scheme.group, rounding.ranges or {}).write(self._directory)


@contextmanager
def _evaluating(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, mode in zip(chunks, modes, strict=True):
            chunk.train(mode)
