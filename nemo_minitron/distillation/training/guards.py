"""Callbacks that stop a training: at values that are not finite, and at a signal before the machine is taken away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from nemo_minitron.distillation.training.checkpoints import LastCheckpoint
from nemo_minitron.errors import NonFiniteError, PreemptedError
from nemo_minitron.runtime.groups import Groups
from nemo_minitron.runtime.stopping import StopRequest

__all__ = ["FiniteGradients", "Preemption", "finite_gradients", "largest"]


def largest(value: float, groups: Groups) -> float:
    """The largest value among all ranks of a training. Collective: two all-reduces of one number."""
    reduced = torch.tensor(value, dtype=torch.float64, device=groups.device.torch)
    for group in (groups.model, groups.dp_cp):
        if dist.get_world_size(group) > 1:
            dist.all_reduce(reduced, op=dist.ReduceOp.MAX, group=group)
    return reduced.item()


def finite_gradients(chunks: Sequence[Any], groups: Groups, whose: str) -> None:
    """Check that all gradients are finite on every rank. Collective.

    Args:
        chunks: this rank's model chunks, in Megatron's ``DistributedDataParallel``.
        groups: of the training.
        whose: name of the model, for the message.

    Raises:
        NonFiniteError: on every rank, if any rank has a gradient that is not finite.
    """
    norms = [
        torch.linalg.vector_norm(buffer.grad_data)
        for chunk in chunks
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]
    broken = not bool(torch.isfinite(torch.stack(norms)).all())
    if largest(float(broken), groups):
        raise NonFiniteError(
            f"a gradient of {whose} is not finite; nothing was updated. "
            "Lower lr, raise warmup_steps, or look for damaged weights with `minitron evaluate`"
        )


class FiniteGradients(pl.Callback):
    """Stops before the optimizer steps on a gradient that is not finite, on every rank with the same message.

    Cost a step: one pass over this rank's gradient buffers, and :func:`largest`.
    """

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """The gradients are complete: the schedule has reduced them over the data-parallel ranks.

        Raises:
            NonFiniteError: for a gradient that is not finite; nothing was updated.
        """
        chunks: Any = trainer.strategy.model
        finite_gradients([chunk.module for chunk in chunks], pl_module.groups, f"step {trainer.global_step}")


class Preemption(pl.Callback):
    """On SIGTERM or SIGUSR1 to any rank: finishes the current step, saves, and ends the training on all ranks.

    Cost a step: :func:`largest`.

    Args:
        request: notes the signals.
    """

    def __init__(self, request: StopRequest) -> None:
        self._request = request

    def on_train_start(self, *_: Any) -> None:
        """Replace Lightning's own handler of SIGTERM, which would end only the rank that gets the signal."""
        self._request.reinstall()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """The step has ended.

        Raises:
            PreemptedError: once the training state is saved.
        """
        over = trainer.global_step >= trainer.max_steps  # and saved anyway
        if over or not largest(float(self._request.received or 0), pl_module.groups):
            return
        next(callback for callback in trainer.checkpoint_callbacks if isinstance(callback, LastCheckpoint)).save(
            trainer
        )
        raise PreemptedError(
            f"stopped by a signal after step {trainer.global_step} of {trainer.max_steps}: its state is saved. "
            "The same command goes on from there"
        )
