"""Training of the attribute model: NeMo-Aligner's ``MegatronGPTRegressionRewardModel`` and ``SupervisedTrainer``.

The loss is Aligner's: the mean squared error over the attributes that a sample has a value of (SteerLM, arXiv
2310.05344, writes the values as text instead; HelpSteer 2, arXiv 2406.08673, section 4, is this regression).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nemo_aligner.models.nlp.gpt.megatron_gpt_regression_reward_model import MegatronGPTRegressionRewardModel
from omegaconf import open_dict

from nemo_minitron.alignment.metrics import FiniteLoss
from nemo_minitron.alignment.session import Session, open_session
from nemo_minitron.alignment.supervised import supervised
from nemo_minitron.alignment.validation import ValidationBatches
from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.formats.torch_dist.reader import TorchDist
from nemo_minitron.config import AlignmentSchedule
from nemo_minitron.data.chat.attributes import AttributeSchema
from nemo_minitron.errors import CheckpointError
from nemo_minitron.runtime.groups import ParallelLayout

__all__ = ["NO_VALUE", "AttributeRewardModel", "ScoredSample", "collate", "read_head", "train_reward"]

NO_VALUE = -100.0
"""Aligner's ``loss_mask_val``: the label of an attribute that a sample has no value of."""
_PAD_TO = 16
_HEAD = "rm_head"


class ScoredSample(NamedTuple):
    """A conversation and the values of its last answer.

    Attributes:
        ids: ``[n]`` tokens.
        values: value of each attribute of the schema, :data:`NO_VALUE` where it is not labelled; at least one is.
    """

    ids: list[int]
    values: list[float]

    @classmethod
    def of(cls, ids: list[int], attributes: Mapping[str, int], schema: AttributeSchema) -> ScoredSample:
        """A sample from attribute values by name."""
        return cls(ids, [float(attributes[name]) if name in attributes else NO_VALUE for name in schema.names])


def collate(batch: list[ScoredSample]) -> dict[str, torch.Tensor]:
    """Samples as Aligner's regression model takes them.

    Returns:
        ``inputs``, ``position_ids`` ``[b, s]``, ``attention_mask`` ``[b, 1, s, s]`` (True: no attention),
        ``lengths`` ``[b]``, ``loss_mask`` ``[b, s]`` (0 for padding) and ``labels`` ``[b, A]``.
    """
    lengths = torch.tensor([len(sample.ids) for sample in batch])
    width = -(-int(lengths.max()) // _PAD_TO) * _PAD_TO
    inputs = torch.zeros(len(batch), width, dtype=torch.int64)
    for row, sample in enumerate(batch):
        inputs[row, : len(sample.ids)] = torch.tensor(sample.ids)
    causal = torch.ones(width, width, dtype=torch.bool).triu(1)
    return {
        "inputs": inputs,
        "lengths": lengths,
        "position_ids": torch.arange(width).expand(len(batch), width).contiguous(),
        "attention_mask": causal.expand(len(batch), 1, width, width).contiguous(),
        "loss_mask": (torch.arange(width) < lengths[:, None]).float(),
        "labels": torch.tensor([sample.values for sample in batch]),
    }


class AttributeRewardModel(FiniteLoss, ValidationBatches, MegatronGPTRegressionRewardModel):  # type: ignore[misc]
    """Aligner's model for batches of any length; validation batches may have another size.

    Aligner itself sends tensors of the longest length from pipeline stage to pipeline stage.
    """

    def get_loss_and_metrics(self, batch: dict[str, torch.Tensor], forward_only: bool) -> tuple[float, dict[str, Any]]:
        """As Aligner's.

        Args:
            batch: of :func:`collate`, a whole global batch's part of this data-parallel rank.
            forward_only: of a validation.
        """
        with open_dict(self.cfg):
            self.cfg.encoder_seq_length = batch["inputs"].shape[1]
        return super().get_loss_and_metrics(batch, forward_only)


def train_reward(
    checkpoint: Checkpoint,
    samples: Sequence[ScoredSample],
    held_out: Sequence[ScoredSample],
    *,
    schema: AttributeSchema,
    layout: ParallelLayout,
    schedule: AlignmentSchedule,
    seed: int = 1234,
    directory: Path,
    max_length: int,
    resume: bool = True,
) -> Path:
    """Train. Every rank calls it.

    The head starts at the mean of the training labels and at small weights drawn by ``seed``, the same under every
    layout.

    Args:
        checkpoint: initial weights of the decoder.
        samples, held_out: training and validation samples.
        schema: attributes of the head.
        layout: of the model.
        schedule: hyper-parameters.
        seed: of the order of the samples and of the head's initial weights.
        directory: gets ``checkpoints/``, ``metrics.jsonl`` and ``tensorboard/``.
        max_length: of a sample, in tokens.
        resume: go on from the last checkpoint in ``directory``.

    Returns:
        The last training checkpoint, a distributed one: the decoder, and the head (:func:`read_head`).

    Raises:
        MinitronError: for a model, a layout or data that do not fit; NonFiniteError for a loss that is not finite.
    """
    session = open_session(
        AttributeRewardModel,
        checkpoint,
        layout=layout,
        schedule=schedule,
        seed=seed,
        kind="rm",
        directory=directory,
        samples=len(samples),
        held_out=len(held_out),
        max_length=max_length,
        resume=resume,
        model=_settings(len(schema.names), schedule),
        skip=(_HEAD,),
    )
    _start_head(session, samples, seed)
    return supervised(session, samples, held_out, collate, label="attribute model", max_minutes=schedule.max_minutes)


def _settings(attributes: int, schedule: AlignmentSchedule) -> dict[str, Any]:
    """Further settings that Aligner's reward models read (``training_rm.yaml`` of its examples)."""
    return {
        "regression": {
            "num_attributes": attributes,
            "merge_attributes": False,
            "attribute_weights": None,
            "loss_mask_val": NO_VALUE,
        },
        "loss_mask_val": NO_VALUE,
        "loss_func": "regression",
        "output_sequence": False,
        "use_avg_pool": False,
        "force_head_dtype": "float32",
        "forward_micro_batch_size": schedule.micro_batch_size,
    }


def _start_head(session: Session, samples: Sequence[ScoredSample], seed: int) -> None:
    """Initial weights of the head; a rank holds columns of ``[A, h]`` (a row-parallel linear)."""
    labels = torch.tensor([sample.values for sample in samples])
    given = labels != NO_VALUE
    mean = labels.where(given, 0.0).sum(0) / given.sum(0).clamp(min=1)
    for chunk in session.model.get_model_module_list():
        head = getattr(chunk, _HEAD, None)
        if head is None:
            continue
        layout, local = session.groups.layout, head.weight.shape[1]
        generator = torch.Generator().manual_seed(seed)
        whole = torch.randn(head.weight.shape[0], local * layout.tensor, generator=generator) * 0.02
        with torch.no_grad():
            head.weight.copy_(whole[:, session.groups.tp_rank * local :][:, :local])
            head.bias.copy_(mean)


def read_head(last: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight ``[A, h]`` and bias ``[A]`` of a training checkpoint's head.

    Raises:
        CheckpointError: if the checkpoint has no head.
    """
    store = TorchDist(last)
    candidates = []
    for part in ("weight", "bias"):
        key = next((name for name in store.sizes if name.removeprefix("model.") == f"{_HEAD}.{part}"), None)
        if key is None:
            raise CheckpointError(f"{last} holds no {_HEAD}.{part}; it is not a training of `minitron reward`")
        candidates.append(store.read(key, [slice(0, size) for size in store.sizes[key]]))
    return candidates[0], candidates[1]
