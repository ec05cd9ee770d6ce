"""Preference optimization with NeMo-Aligner's ``MegatronGPTDPOModel`` and ``DPOTrainer``: DPO, IPO, RPO."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nemo_aligner.algorithms.dpo import DPOTrainer, dpo_custom_collate
from nemo_aligner.data.nlp.builders import identity_collate
from nemo_aligner.models.nlp.gpt.megatron_gpt_dpo_model import MegatronGPTDPOModel
from nemo_aligner.utils.utils import retrieve_model_state_dict_in_cpu

from nemo_minitron.alignment.metrics import FiniteLoss
from nemo_minitron.alignment.pairs import Pair, Pairs, preference_statistics
from nemo_minitron.alignment.session import Session, fill, last_checkpoint, open_session
from nemo_minitron.alignment.validation import ValidationBatches
from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.config import AlignmentSchedule, Preferences
from nemo_minitron.errors import CheckpointError
from nemo_minitron.parsing import parse_json
from nemo_minitron.runtime.files import replace_file
from nemo_minitron.runtime.groups import ParallelLayout

__all__ = ["DpoModel", "train_dpo"]

STATISTICS = "preferences.json"
"""What held-out pairs said before and after; its presence says that the training is done."""


def dpo_settings(preferences: Preferences, micro_batch_size: int) -> dict[str, Any]:
    """The settings of Aligner's ``model.dpo``."""
    return {
        "preference_loss": preferences.loss,
        "ref_policy_kl_penalty": preferences.beta,
        "gt_reward_scale": preferences.reward_scale,
        "log_prob_forward_micro_batch_size": micro_batch_size,
        "preference_loss_weight": preferences.preference_loss_weight,
        "sft_loss_weight": preferences.sft_loss_weight,
        "preference_average_log_probs": preferences.preference_average_log_probs,
        "sft_average_log_probs": preferences.sft_average_log_probs,
    }


class DpoModel(FiniteLoss, ValidationBatches, MegatronGPTDPOModel):
    """Aligner's DPO model; it stops at a loss that is not finite, and its validation batches may have another size."""


def train_dpo(
    checkpoint: Checkpoint,
    reference: Checkpoint,
    train: Sequence[Pair],
    held_out: Sequence[Pair],
    preferences: Preferences,
    *,
    layout: ParallelLayout,
    schedule: AlignmentSchedule,
    seed: int = 1234,
    directory: Path,
    max_length: int,
    resume: bool = True,
    label: str = "preferences",
) -> tuple[Path, dict[str, Any]]:
    """Train a policy to prefer the chosen answers. Every rank calls it, with the same pairs.

    Args:
        checkpoint: the policy to start from.
        reference: the reference policy, of the same sizes. Its weights stay on the CPU; before each step they are
            swapped with the policy's for one forward pass, as Aligner does it.
        train, held_out: pairs.
        preferences: the loss.
        layout: of the model.
        schedule: hyper-parameters.
        seed: of the order of the samples.
        directory: gets ``checkpoints/``, ``metrics.jsonl``, ``tensorboard/`` and, at the end, ``preferences.json``.
        max_length: of a conversation's inputs, in tokens.
        resume: go on from the last checkpoint in ``directory``.
        label: of the progress bar.

    Returns:
        ``(last training checkpoint, {"before": ..., "after": ...})``: what
        :func:`~nemo_minitron.alignment.pairs.preference_statistics` says of the held-out pairs.

    Raises:
        MinitronError: see :func:`~nemo_minitron.alignment.session.open_session`; NonFiniteError for the loss.
    """
    session = open_session(
        DpoModel,
        checkpoint,
        layout=layout,
        schedule=schedule,
        seed=seed,
        kind="dpo",
        directory=directory,
        samples=len(train),
        held_out=len(held_out),
        max_length=max_length,
        resume=resume,
        model={"dpo": dpo_settings(preferences, schedule.micro_batch_size)},
    )
    model = session.model
    if reference is not checkpoint:
        fill(model, reference, session.groups)
    model.ref_policy_state_dict = retrieve_model_state_dict_in_cpu(
        model, megatron_amp_O2=session.config.model.megatron_amp_O2
    )
    if reference is not checkpoint:
        fill(model, checkpoint, session.groups)
    # Padding has no label, so any token will do.
    collate = partial(dpo_custom_collate, eos_id=0)
    validation = session.loader(Pairs(held_out), identity_collate, training=False)
    loader = session.loader(Pairs(train), identity_collate, training=True)
    with session.training(
        DPOTrainer, loader, validation, label=label, max_minutes=schedule.max_minutes, collate_fn=collate
    ) as trainer:
        multiple = trainer.pad_seq_length_to_mult
        measure = partial(
            preference_statistics,
            model,
            collate=partial(collate, pad_length_to_multiple_of=multiple),
            groups=session.groups,
            beta=preferences.beta,
        )
        before = _before(session, lambda: measure(batches=validation))
        trainer.fit()
        statistics = {"before": before, "after": measure(batches=validation)}
    if session.groups.is_main:
        replace_file(directory / STATISTICS, json.dumps(statistics, indent=2) + "\n")
    return last_checkpoint(directory), statistics


def read_statistics(path: Path) -> dict[str, Any] | None:
    """The statistics in a file that a training wrote; None if it is missing or damaged."""
    try:
        statistics = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    return statistics if isinstance(statistics, dict) else None


def _before(session: Session, measure: Any) -> dict[str, float]:
    """Statistics of the held-out pairs before the first step; a resumed training reads them from their file."""
    path = session.directory / "before.json"
    if session.state is not None:
        if not path.is_file():
            raise CheckpointError(f"{path} is gone, which the training that is resumed wrote; set resume=false")
        if (reference := read_statistics(path)) is None:
            raise CheckpointError(f"{path} is damaged, which the training that is resumed wrote; set resume=false")
        return reference
    before: dict[str, float] = measure()
    if session.groups.is_main:
        replace_file(path, json.dumps(before) + "\n")
    return before
