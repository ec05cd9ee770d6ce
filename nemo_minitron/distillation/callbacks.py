"""What a training tells: one JSON object a step, TensorBoard through NeMo's logger, a progress bar on rank 0."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as pl
from nemo.lightning.megatron_parallel import MegatronStep

from nemo_minitron.distillation.balance import LOGITS
from nemo_minitron.runtime.groups import Groups
from nemo_minitron.runtime.progress import Advance, progress_bar

__all__ = ["ProgressBar", "StepMetrics"]


class StepMetrics(pl.Callback):
    """Writes ``metrics.jsonl``: a line a training step and a line a validation.

    The last pipeline stage knows the loss, so its first rank writes. After a resume, lines of steps that are trained
    again are dropped first.

    Training lines: ``step`` (1-based), ``tokens`` (in all), the values of the loss (of a distillation ``kl``, and
    ``lm_loss`` where labels take part; otherwise ``lm_loss``), ``lr`` (of this step), ``grad_norm``,
    ``tokens_per_second``, ``seconds`` (since the start of this process's training). Validation lines: ``split`` =
    "validation", ``step``, ``tokens``, of a distillation ``kl``, and ``lm_loss``. With intermediate losses both have
    the value of each, times its own weight (``hidden``, ``embedding``, ``attention``), and ``alpha``, the weight of
    their sum in that step.
    """

    def __init__(self, path: Path, *, tokens_per_step: int, every: int = 1) -> None:
        self.path = path
        self.tokens_per_step = tokens_per_step
        self.every = every
        self._file: IO[str] | None = None
        self._started = self._last = 0.0
        self._validation: list[dict[str, float]] = []
        self._values: dict[str, float] = {}
        self._lr = 0.0

    def _writes(self, module: Any) -> bool:
        groups: Groups = module.groups
        return groups.is_last_stage and groups.tp_rank == 0 and groups.dp_rank == 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the file on the rank that writes; a checkpoint, if there is one, has been restored."""
        self._started = self._last = time.monotonic()
        if not self._writes(pl_module):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _lines(self.path) if line["step"] <= trainer.global_step]
        aside = self.path.with_suffix(".partial")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        aside.replace(self.path)
        self._file = self.path.open("a", buffering=1)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """The learning rate of the step; after it, the scheduler has moved on."""
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_megatron_reduce_microbatches_end(self, step: MegatronStep, loss_reduction: Any, reduced: Any) -> None:
        """Called on the last stage with the reduced loss of a step."""
        values: dict[str, float] = loss_reduction.values
        if step.forward_only:
            self._validation.append({**values, **_parts(step.pl_module)})
        else:
            self._values = values

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """One line, with the step that has just updated the weights."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        step = trainer.global_step
        if self._file is None or step % self.every:
            return
        logged = trainer.callback_metrics
        self._write(
            step=step,
            tokens=step * self.tokens_per_step,
            **self._values,
            lr=self._lr,
            grad_norm=float(logged["grad_norm"]) if "grad_norm" in logged else None,
            tokens_per_second=self.tokens_per_step / seconds,
            seconds=now - self._started,
            **_parts(pl_module),
        )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """One line with the means over the validation's steps."""
        if self._file is not None and self._validation and not trainer.sanity_checking:
            count = len(self._validation)
            self._write(
                split="validation",
                step=trainer.global_step,
                tokens=trainer.global_step * self.tokens_per_step,
                **{name: sum(found[name] for found in self._validation) / count for name in self._validation[0]},
            )
        self._validation.clear()
        self._last = time.monotonic()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, **values: Any) -> None:
        assert self._file is not None
        self._file.write(json.dumps(values) + "\n")


class ProgressBar(pl.Callback):
    """Loss and throughput on rank 0. (NeMo's own printer enters a collective on rank 0 alone.)"""

    def __init__(self, title: str, steps: int, *, tokens_per_step: int) -> None:
        self.title = title
        self.steps = steps
        self.tokens_per_step = tokens_per_step
        self._stack = ExitStack()
        self._advance: Advance | None = None
        self._last = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar."""
        self._last = time.monotonic()
        self._advance = self._stack.enter_context(
            progress_bar(self.title, self.steps, completed=trainer.global_step, shown=trainer.is_global_zero)
        )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Advance it."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        if self._advance is not None:
            found = trainer.callback_metrics.get("reduced_train_loss")
            loss = f"loss {float(found):.3f}, " if found is not None else ""
            self._advance(1, f"{loss}{self.tokens_per_step / seconds:,.0f} tokens/s")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take it away, also after an error."""
        self._stack.close()
        self._advance = None


def _parts(module: Any) -> dict[str, float]:
    """The intermediate losses of the step that just ended, and their weight; empty where there are none."""
    return {name: value for name, value in module.balance.means.items() if name != LOGITS}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a last line cut off by a kill is left out."""
    found = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return found
