"""The checkpoints that a training keeps, as NeMo's own callbacks write them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.lightning.pytorch.callbacks import ModelCheckpoint

from nemo_minitron.checkpoints.training_state import SealedStates, clear_previous
from nemo_minitron.distillation.training.outputs import directories, value_of

__all__ = ["BestCheckpoint", "LastCheckpoint"]


class LastCheckpoint(SealedStates, ModelCheckpoint):
    """Keeps the latest training state: saved at each validation, and every ``every`` steps.

    The state before it is kept too, in ``previous``, until the training has ended.

    Args:
        directory: of the checkpoints.
        every: number of steps.
    """

    # NeMo's logger sets the class's own to the pattern of whichever callback comes last.
    CHECKPOINT_NAME_LAST = "step={step}-last"

    def __init__(self, directory: Path, *, every: int) -> None:
        super().__init__(
            dirpath=str(directory),
            filename="step={step}",
            auto_insert_metric_name=False,
            monitor=None,
            save_last=True,
            save_top_k=0,  # the last one alone: it holds the optimizer too
            every_n_train_steps=every,
            save_optim_on_train_end=True,
        )

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        """The last step is saved after its validation: a training that finds this checkpoint is complete."""
        if trainer.global_step < trainer.max_steps:
            super().on_train_batch_end(trainer, *arguments)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A training that came to its end, by steps or time, needs one state; one that was stopped raises instead."""
        super().on_train_end(trainer, pl_module)
        if trainer.is_global_zero and self.dirpath is not None:
            clear_previous(Path(self.dirpath))

    def save(self, trainer: pl.Trainer) -> None:
        """Save now, unless this step is saved."""
        if self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


class BestCheckpoint(ModelCheckpoint):
    """Keeps the weights of the validation with the lowest value, beside NeMo's own checkpoint callback.

    NeMo's class does not allow a second instance in a trainer: each would clean the log directory on a resume and
    rename the other's checkpoints to its own pattern.

    Args:
        directory: of the single checkpoint that is kept.
        monitor: the value's name among the trainer's metrics.
    """

    def __init__(self, directory: Path, monitor: str) -> None:
        super().__init__(
            dirpath=str(directory),
            # The value is read out of the name when a training goes on.
            filename="{step}-{" + monitor + ":.8f}",
            monitor=monitor,
            save_last=False,
            save_top_k=1,
            save_weights_only=True,
            every_n_epochs=1,  # at each validation
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look for an earlier process's best checkpoint: the restored state may be older than the files."""
        assert self.dirpath is not None
        kept = sorted(directories(Path(self.dirpath)), key=value_of)
        for path in kept[1:]:  # killed before it could be removed
            shutil.rmtree(path, ignore_errors=True)  # by whichever rank comes first
        best = kept[0] if kept else None
        self.best_k_models = {} if best is None else {str(best): torch.tensor(value_of(best))}
        self.kth_best_model_path = self.best_model_path = "" if best is None else str(best)
        self.best_model_score = self.kth_value = self.best_k_models.get(self.best_model_path)
