"""Metrics of a training with Aligner: one JSON object per step, TensorBoard, a progress bar; and the stop on NaN."""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from lightning.pytorch.loggers import TensorBoardLogger

from nemo_minitron.errors import NonFiniteError
from nemo_minitron.runtime.files import resumed_lines
from nemo_minitron.runtime.progress import Advance, progress_bar

__all__ = ["FiniteLoss", "MetricsLog"]


class FiniteLoss:
    """Mixed into one of Aligner's models: a loss that is not finite ends the training before the optimizer steps.

    Aligner sends the loss to every rank, so all of them stop.
    """

    def get_loss_and_metrics(self, batch: Any, forward_only: bool) -> tuple[float, dict[str, Any]]:
        """As the model's own.

        Raises:
            NonFiniteError: before the optimizer uses the gradients.
        """
        loss, metrics = super().get_loss_and_metrics(batch, forward_only)  # type: ignore[misc]
        if not math.isfinite(loss):
            what = "validation" if forward_only else "training"
            raise NonFiniteError(
                f"the {what} loss is {loss}; the weights are those of the step before. Lower lr, or look for broken "
                "samples in data"
            )
        return loss, metrics


class MetricsLog:
    """The logger of Aligner's trainers. Rank 0 writes.

    ``metrics.jsonl`` has a line per step, with ``step`` (1-based), ``samples`` (in all), ``seconds`` (since the start
    of this process's training) and the metrics of Aligner's model and trainer (``loss``, ``lr``, ``step_time``, ...);
    and a line per validation, with ``split`` = "validation". A resume first drops the lines of steps that it will train
    again, and those of validations that only a stop brought about: it ends with the lines of an uninterrupted training.

    Args:
        directory: gets ``metrics.jsonl`` and ``tensorboard/``.
        label: of the progress bar.
        steps: optimizer steps in all.
        done: steps of the checkpoint that is resumed.
        validate_every: steps between validations; there is one after the last step too.
        writes: whether this rank writes.
    """

    def __init__(
        self, directory: Path, *, label: str, steps: int, done: int, validate_every: int, writes: bool
    ) -> None:
        self.directory = directory
        self._stack = ExitStack()
        self._file: IO[str] | None = None
        self._board: TensorBoardLogger | None = None
        self._started = time.monotonic()
        if writes:
            path = directory / "metrics.jsonl"
            directory.mkdir(parents=True, exist_ok=True)

            def keep(line: dict[str, Any]) -> bool:
                step = line["step"]
                due = "split" not in line or step % validate_every == 0 or step == steps
                return bool(step <= done and done and due)

            resumed_lines(path, keep, done=done)
            self._file = self._stack.enter_context(path.open("a", buffering=1))
            self._board = TensorBoardLogger(save_dir=str(directory), name="tensorboard", version="")
        self._advance: Advance = self._stack.enter_context(progress_bar(label, steps, completed=done, shown=writes))

    def log_metrics(self, metrics: dict[str, Any], step: int, prefix: str = "") -> None:
        """Called by Aligner's trainers: with ``prefix`` "train/" and the number of steps before, or "val/"."""
        values = {name: float(value) for name, value in metrics.items()}
        training = prefix == "train/"
        if training:
            step += 1
            self._advance(1, f"loss {values['loss']:.4f}")
        if self._file is None:
            return
        line: dict[str, Any] = {"step": step} if training else {"split": "validation", "step": step}
        if "consumed_samples" in values:
            line["samples"] = int(values.pop("consumed_samples"))
        self._file.write(json.dumps({**line, **values, "seconds": time.monotonic() - self._started}) + "\n")
        if self._board is not None:
            self._board.log_metrics({prefix + name: value for name, value in values.items()}, step)

    def finalize(self) -> None:
        """Called by Aligner's trainers when the last step is done."""

    def close(self) -> None:
        """Remove the bar and close the files; also after an error."""
        if self._board is not None:
            self._board.finalize("success")
        self._stack.close()
