"""SteerLM 2 with NeMo-Aligner's ``GPTSteerLMModel``: training towards ``P(y|a,x) ~ P(a|x,y) P(y|x)``.

Several answers ``y`` to each prompt ``x`` with wanted attribute values ``a`` are sampled from a first model ``Q``,
which SteerLM trained. The target weights of the answers to a prompt are
``softmax(log P(a|x,y) + log P(y|x) - log Q(y|a,x))`` (HelpSteer 2, arXiv 2406.08673, section 5.3). Aligner's loss is
the difference between these and the model's own weights, times the answers' negative log-likelihood.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nemo_aligner.models.nlp.gpt.gpt_steerlm_model import GPTSteerLMModel

from nemo_minitron.alignment.metrics import FiniteLoss
from nemo_minitron.alignment.session import open_session
from nemo_minitron.alignment.supervised import supervised
from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.config import AlignmentSchedule
from nemo_minitron.runtime.groups import Groups, ParallelLayout

__all__ = ["Responses", "SteerlmModel", "collate", "train_steerlm2"]

_PAD_TO = 8


class Responses(NamedTuple):
    """The answers to one prompt.

    Attributes:
        prompt: tokens, attribute values included, up to where the assistant answers.
        answers: tokens of each, its end token included.
        log_q: ``log Q(y|a,x)`` of each.
        log_p: ``log P(a|x,y) + log P(y|x)`` of each.
    """

    prompt: list[int]
    answers: list[list[int]]
    log_q: list[float]
    log_p: list[float]


def collate(batch: list[Responses]) -> dict[str, torch.Tensor]:
    """Groups as Aligner's model takes them: the answers to a prompt stand together.

    Returns:
        ``tokens``, ``labels``, ``loss_mask``, ``position_ids`` ``[b * r, s]``, ``attention_mask`` (not looked at:
        attention is causal), ``ws``, ``log(Q(y|a,x))``, ``num_responses`` ``[b * r]``.
    """
    rows = [(group.prompt, answer) for group in batch for answer in group.answers]
    longest = max(len(prompt) + len(answer) - 1 for prompt, answer in rows)
    width = -(-longest // _PAD_TO) * _PAD_TO
    tokens, labels = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(2))
    mask = torch.zeros(len(rows), width)
    for row, (prompt, answer) in enumerate(rows):
        ids = torch.tensor([*prompt, *answer])
        tokens[row, : len(ids) - 1], labels[row, : len(ids) - 1] = ids[:-1], ids[1:]
        mask[row, len(prompt) - 1 : len(ids) - 1] = 1
    log_q = torch.tensor([group.log_q for group in batch], dtype=torch.float64)
    weights = (torch.tensor([group.log_p for group in batch], dtype=torch.float64) - log_q).softmax(-1)
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": mask,
        "position_ids": torch.arange(width).expand(len(rows), width).contiguous(),
        "attention_mask": torch.zeros(len(rows), 1, 1, 1, dtype=torch.bool),
        "ws": weights.flatten().float(),
        "log(Q(y|a,x))": log_q.flatten().float(),
        "num_responses": torch.full((len(rows),), len(batch[0].answers)),
    }


class SteerlmModel(FiniteLoss, GPTSteerLMModel):  # type: ignore[misc]
    """Aligner's SteerLM 2 model; it stops at a loss that is not finite."""


def train_steerlm2(
    checkpoint: Checkpoint,
    prompts: int,
    held_out: int,
    answer: Callable[[list[Any], Groups], tuple[list[Responses], list[Responses]]],
    *,
    layout: ParallelLayout,
    schedule: AlignmentSchedule,
    seed: int = 1234,
    directory: Path,
    max_length: int,
    resume: bool = True,
) -> Path:
    """Train. Every rank calls it.

    Args:
        checkpoint: the model ``Q``; the training starts from it too.
        prompts, held_out: how many groups ``answer`` gives.
        answer: called with the chunks of ``Q`` and the process groups; gives the groups to train on and to validate
            on, the same on every rank.
        layout: of the model.
        schedule: hyper-parameters; a sample is a prompt with its answers, a micro-batch one answer.
        seed: of the order of the samples.
        directory: gets ``checkpoints/``, ``metrics.jsonl`` and ``tensorboard/``.
        max_length: of a sample, in tokens.
        resume: go on from the last checkpoint in ``directory``.

    Returns:
        The last training checkpoint. ``metrics.jsonl`` has ``distance`` too, the divergence of the model's weights of
        the answers from those wanted.

    Raises:
        MinitronError: see :func:`~nemo_minitron.alignment.session.open_session`.
    """
    session = open_session(
        SteerlmModel,
        checkpoint,
        layout=layout,
        schedule=schedule,
        seed=seed,
        kind="steerlm2",
        directory=directory,
        samples=prompts,
        held_out=held_out,
        max_length=max_length,
        resume=resume,
        model={"steerlm2": {"forward_micro_batch_size": 1, "micro_batch_size": 1}},
    )
    train, validation = answer(list(session.model.get_model_module_list()), session.groups)
    return supervised(session, train, validation, collate, label="SteerLM 2", max_minutes=schedule.max_minutes)
