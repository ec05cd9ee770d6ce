"""Metrics of a training: one JSON object per step, TensorBoard through NeMo's logger, a progress bar on rank 0."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as pl
import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from nemo.lightning import _strategy_lib
from nemo.lightning.megatron_parallel import MegatronStep

from nemo_minitron.distillation.losses.balance import LOGITS
from nemo_minitron.distillation.training.guards import largest
from nemo_minitron.runtime.device import Device
from nemo_minitron.runtime.files import resumed_lines
from nemo_minitron.runtime.groups import Groups
from nemo_minitron.runtime.memory import peak_rss_bytes
from nemo_minitron.runtime.progress import Advance, progress_bar

__all__ = ["VALIDATION", "ExactPosition", "ProgressBar", "StepMetrics"]

VALIDATION = "val_"
"""Before the name of a validation's value in NeMo's own metrics."""


class StepMetrics(pl.Callback):
    """Writes ``metrics.jsonl``: a line per training step and a line per validation.

    The last pipeline stage knows the loss, so its first rank writes. After a resume, lines of steps that are trained
    again are dropped first.

    Training lines: ``step`` (1-based), ``tokens`` (in all), the values of the loss (of a distillation ``kl``, and
    ``lm_loss`` if labels are part of the loss; otherwise ``lm_loss``), ``lr`` (of this step), ``grad_norm``,
    ``tokens_per_second``, ``tflops`` (model FLOPs per second and rank, in 1e12, without recomputation), ``memory``
    (largest of any rank so far, in bytes: allocated on CUDA, otherwise resident), ``seconds`` (since the start of this
    process's training). Validation lines: ``split`` = "validation", ``step``, ``tokens``, of a distillation ``kl``, and
    ``lm_loss``. With intermediate losses both have the value of each, times its own weight (``hidden``, ``embedding``,
    ``attention``), and ``alpha``, the weight of their sum in that step. With a teacher that is trained at the same
    time, training lines have ``teacher_lm_loss``, ``teacher_lr`` and ``teacher_grad_norm``. With several teachers both
    have ``kl_<name>`` of each that taught, per token that it taught; ``kl`` is the weighted sum.
    """

    def __init__(self, path: Path, *, tokens_per_step: int, flops_per_step: float, every: int = 1) -> None:
        self.path = path
        self.flops_per_step = flops_per_step
        self.tokens_per_step = tokens_per_step
        self.every = every
        self._file: IO[str] | None = None
        self._started = self._last = 0.0
        self._validation: list[dict[str, float]] = []
        self._validated: list[float] = []  # valid tokens of each
        self._values: dict[str, float] = {}
        self._lr = 0.0

    def _writes(self, module: Any) -> bool:
        groups: Groups = module.groups
        return groups.is_last_stage and groups.tp_rank == groups.dp_rank == groups.cp_rank == 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the file on the rank that writes; a checkpoint, if there is one, has been restored."""
        self._started = self._last = time.monotonic()
        if not self._writes(pl_module):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A validation that is due now is made again.
        done = trainer.global_step
        resumed_lines(self.path, lambda line: line["step"] + ("split" in line) <= done, done=done, every=self.every)
        self._file = self.path.open("a", buffering=1)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Note the learning rate of the step; after the step the scheduler has the next one."""
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_megatron_reduce_microbatches_end(self, step: MegatronStep, loss_reduction: Any, reduced: Any) -> None:
        """Called on the last stage with the reduced loss of a step."""
        if step.forward_only:
            self._validation.append({**loss_reduction.values, **_parts(step.pl_module)})
            self._validated.append(loss_reduction.tokens)
        else:
            self._values = loss_reduction.values

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """One line, with the step that has just updated the weights."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        step = trainer.global_step
        if step % self.every:
            return
        memory = largest(_peak_memory(pl_module.groups.device), pl_module.groups)
        if self._file is None:
            return
        logged = trainer.callback_metrics
        self._write(
            step=step,
            tokens=step * self.tokens_per_step,
            **pl_module.reported(self._values),
            lr=self._lr,
            grad_norm=float(logged["grad_norm"]) if "grad_norm" in logged else None,
            tokens_per_second=self.tokens_per_step / seconds,
            tflops=self.flops_per_step / seconds / trainer.world_size / 1e12,
            memory=int(memory),
            seconds=now - self._started,
            **_parts(pl_module),
            **pl_module.further,
        )

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Hands the means to NeMo's loggers and checkpoints, on every rank, as ``val_kl`` and ``val_lm_loss``."""
        for name in pl_module.VALIDATED:
            value = torch.tensor(self._mean(name), dtype=torch.float32, device=pl_module.groups.device.torch)
            # The last stage knows it.
            _strategy_lib._sync_from_last_pipeline_stage(value, broadcast=True)
            pl_module.log(VALIDATION + name, value)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """One line with the means over all valid tokens of the validation."""
        if self._file is not None and self._validation and not trainer.sanity_checking:
            self._write(
                split="validation",
                step=trainer.global_step,
                tokens=trainer.global_step * self.tokens_per_step,
                **pl_module.reported({name: self._mean(name) for name in self._validation[0]}),
            )
        self._validation, self._validated = [], []
        self._last = time.monotonic()

    def _mean(self, name: str) -> float:
        """Mean of a value over the tokens of the validation's steps; 0 on stages that do not have it."""
        weighed = zip(self._validation, self._validated, strict=True)
        return sum(values[name] * tokens for values, tokens in weighed) / max(1.0, sum(self._validated))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, **values: Any) -> None:
        assert self._file is not None
        self._file.write(json.dumps(values) + "\n")


class ExactPosition(pl.Callback):
    """Corrects Lightning's counters after a resume, so that validations fall on the same steps.

    Checkpoints are saved in hooks that Lightning calls before it counts the batch as completed, so a resume would be
    one batch behind. If the training was killed before a validation that was due, Lightning would also take the
    validation before it for the one that is due. A validation that is due at the checkpoint's step is (re)run.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The checkpoint has been restored. A batch is a step: micro-batches are NeMo's."""
        step, loop = trainer.global_step, trainer.fit_loop.epoch_loop
        if step == 0:
            return
        for counts in (loop.batch_progress.current, loop.batch_progress.total):
            counts.ready = counts.started = counts.processed = counts.completed = step
        # The fetcher counts micro-batches, the loop adds a batch for each step: the last one would go unnoticed.
        trainer.fit_loop._data_fetcher.fetched += step * (get_num_microbatches() - 1)
        if step % trainer.val_check_batch == 0:
            loop.skip_val_on_restart = False  # NeMo's loop would take it for done
            loop.val_loop.batch_progress.reset()
            loop.val_loop.restarting = False


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
        """Advance the bar."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        if self._advance is not None:
            reduced = trainer.callback_metrics.get("reduced_train_loss")
            loss = f"loss {float(reduced):.3f}, " if reduced is not None else ""
            self._advance(1, f"{loss}{self.tokens_per_step / seconds:,.0f} tokens/s")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove the bar, also after an error."""
        self._stack.close()
        self._advance = None


def _peak_memory(device: Device) -> int:
    """Peak memory of this process in bytes: on CUDA that of its device, otherwise resident memory."""
    if device.is_cuda:
        return torch.cuda.max_memory_allocated()
    return peak_rss_bytes()


def _parts(module: Any) -> dict[str, float]:
    """The intermediate losses of the step that just ended, and their weight; empty where there are none."""
    return {name: value for name, value in module.balance.means.items() if name != LOGITS}
