"""Supervised fine-tuning with NeMo-Aligner's ``GPTSFTModel`` and ``SupervisedTrainer``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_aligner.models.nlp.gpt.gpt_sft_model import GPTSFTModel

from nemo_minitron.alignment.batches import Sample, collate
from nemo_minitron.alignment.metrics import FiniteLoss
from nemo_minitron.alignment.session import open_session
from nemo_minitron.alignment.supervised import supervised
from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.config import AlignmentSchedule
from nemo_minitron.runtime.groups import ParallelLayout
from nemo_minitron.runtime.masks import documents_masked

__all__ = ["SftModel", "train_sft"]


class SftModel(FiniteLoss, GPTSFTModel):
    """Aligner's SFT model; it stops at a loss that is not finite."""


def train_sft(
    checkpoint: Checkpoint,
    train: Sequence[Sample],
    held_out: Sequence[Sample],
    *,
    layout: ParallelLayout,
    schedule: AlignmentSchedule,
    seed: int = 1234,
    directory: Path,
    max_length: int,
    resume: bool = True,
) -> Path:
    """Fine-tune on the trained tokens of ``train``. Every rank calls it, with the same samples.

    The loss is Aligner's: the mean cross-entropy over the trained tokens of a micro-batch, and the mean over the
    micro-batches of all data-parallel ranks. (So a token weighs more in a micro-batch with fewer trained tokens.)

    Args:
        checkpoint: initial weights and tokenizer.
        train, held_out: samples; where any holds several conversations, attention is masked between them.
        layout: of the model.
        schedule: hyper-parameters.
        seed: of the order of the samples.
        directory: gets ``checkpoints/``, ``metrics.jsonl`` and ``tensorboard/``.
        max_length: of a sample's inputs, in tokens.
        resume: go on from the last checkpoint in ``directory``.

    Returns:
        The last training checkpoint.

    Raises:
        MinitronError: see :func:`~nemo_minitron.alignment.session.open_session`; NonFiniteError for the loss.
    """
    packed = any(len(sample.lengths) > 1 for sample in (*train, *held_out))
    session = open_session(
        SftModel,
        checkpoint,
        layout=layout,
        schedule=schedule,
        seed=seed,
        kind="sft",
        directory=directory,
        samples=len(train),
        held_out=len(held_out),
        max_length=max_length,
        resume=resume,
        model={"get_attention_mask_from_fusion": not packed},
    )
    batch = collate(8 * (layout.tensor if layout.sequence_parallel else 1), masked=packed)
    with documents_masked(session.chunks, packed):
        return supervised(session, train, held_out, batch, label="fine-tuning", max_minutes=schedule.max_minutes)
