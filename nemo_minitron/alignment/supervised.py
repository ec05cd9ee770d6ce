"""Training by NeMo-Aligner's ``SupervisedTrainer``, whatever the model's loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nemo_aligner.algorithms.supervised import SupervisedTrainer
from torch.utils.data import Dataset

from nemo_minitron.alignment.session import Session, last_checkpoint

__all__ = ["Listed", "supervised"]

T = TypeVar("T")


class Listed(Dataset[T]):
    """A list as torch's data loader wants it."""

    def __init__(self, samples: Sequence[T]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> T:
        return self.samples[index]


def supervised(
    session: Session,
    train: Sequence[T],
    held_out: Sequence[T],
    collate: Callable[[list[T]], dict[str, Any]],
    *,
    label: str,
    max_minutes: float | None,
) -> Path:
    """Train the session's model on samples, and validate on others. Every rank calls it, with the same samples.

    A training that is not resumed validates before its first step too.

    Args:
        session: with a model whose loss is computed from a batch.
        train, held_out: training and validation samples.
        collate: from samples to the batch that the model takes.
        label: of the progress bar.
        max_minutes: save a checkpoint and stop after so many minutes.

    Returns:
        The last training checkpoint.

    Raises:
        PreemptedError: after SIGTERM or SIGUSR1 to any rank, once the step has ended and its state is saved.
        NonFiniteError: for a loss that is not finite.
    """
    loader = session.loader(Listed(train), collate, training=True)
    validation = session.loader(Listed(held_out), collate, training=False)
    with session.training(
        SupervisedTrainer,
        loader,
        validation,
        label=label,
        max_minutes=max_minutes,
        run_init_validation=session.state is None,
    ) as trainer:
        trainer.fit()
    return last_checkpoint(session.directory)
