"""Code of the stages that run a model: their plan, process groups, calibration blocks, a live model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from nemo_minitron.config import DataConfig
from nemo_minitron.jobs.plans import PlannedPath, StagePlan
from nemo_minitron.stages.shared.memory import Running

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.config import DepthConfig, SearchConfig
    from nemo_minitron.data import Blocks
    from nemo_minitron.data.tasks import EncodedTask, Question
    from nemo_minitron.runtime.groups import Groups

__all__ = [
    "Measured",
    "blocks_of",
    "calibration_blocks",
    "encoded_task",
    "live_model",
    "open_measured",
    "plan_measuring",
    "start_groups",
]


class Measuring(Running, Protocol):
    """Settings of a stage that measures a model on calibration text."""

    model: str
    data: DataConfig
    samples: int


@dataclass(frozen=True)
class Measured:
    """A model to be measured, before its weights are loaded.

    Attributes:
        checkpoint: of the model.
        groups: of this process.
        blocks: ``[samples, s + 1]`` tokens of the calibration split, the same on every rank.
    """

    checkpoint: Checkpoint
    groups: Groups
    blocks: Blocks


def plan_measuring(config: Measuring, stage: str, written: PlannedPath, *, repeated: str = "") -> StagePlan:
    """The plan that all such stages share.

    Args:
        config: of the stage.
        stage: its name.
        written: its output.
        repeated: how often the calibration text is run, for example ", in each round".
    """
    from nemo_minitron.data.inputs import data_inputs

    data = data_inputs(config.data)
    tokens = config.samples * config.data.sequence_length
    return StagePlan(
        stage,
        reads=[PlannedPath(config.model, "model"), *(PlannedPath(path, what) for path, what in data.files)],
        writes=[written],
        costs={"calibration": f"{tokens:,} tokens in {config.samples:,} samples{repeated}"},
        notes=data.notes,
        faults=[*data.faults, *config.parallel.sequence_faults(config.data.sequence_length)],
    )


def start_groups(config: Running) -> Groups:
    """The groups of this process, by a stage's layout, seed and timeout. Collective."""
    from nemo_minitron.runtime.groups import initialize

    layout, runtime = config.parallel, config.runtime
    return initialize(layout, seed=runtime.seed, timeout_minutes=runtime.collective_timeout_minutes)


def open_measured(config: Measuring) -> Measured:
    """Start the groups, open the model, and cut its calibration blocks. Collective.

    Raises:
        MinitronError: for a checkpoint or text that cannot be used.
    """
    from nemo_minitron.checkpoints import open_checkpoint

    groups = start_groups(config)
    checkpoint = open_checkpoint(config.model)
    return Measured(checkpoint, groups, calibration_blocks(config, checkpoint))


def calibration_blocks(config: Measuring, checkpoint: Checkpoint) -> Blocks:
    """``[samples, s + 1]`` tokens of a stage's calibration split, cut with a model's tokenizer.

    Raises:
        MinitronError: for text that cannot be used.
    """
    return blocks_of(config.data, checkpoint, "calibration", config.samples)


def blocks_of(data: DataConfig, checkpoint: Checkpoint, split: str, count: int) -> Blocks:
    """``[count, s + 1]`` tokens of a split, cut with a model's tokenizer; no longer than the model takes.

    Raises:
        MinitronError: for text that cannot be used.
    """
    from nemo_minitron.data import build_blocks

    return build_blocks(
        data,
        checkpoint.tokenizer,
        split,
        blocks=count,
        vocab_size=checkpoint.shape.vocab_size,
        max_length=checkpoint.architecture.max_position_embeddings,
    )


def live_model(config: Running, checkpoint: Checkpoint, groups: Groups) -> list[GPTModel]:
    """This rank's part of a model, with its weights, in the stage's precision."""
    import torch

    from nemo_minitron.checkpoints import load_into
    from nemo_minitron.runtime.model import build_model

    chunks = build_model(checkpoint.shape, checkpoint.architecture, groups, dtype=getattr(torch, config.runtime.dtype))
    load_into(chunks, checkpoint, groups)
    return chunks


def encoded_task(
    config: DepthConfig | SearchConfig, checkpoint: Checkpoint
) -> tuple[list[Question], EncodedTask | None]:
    """The questions and their tokens; both are empty without a task."""
    from nemo_minitron.data.tasks import encode_task, read_task

    if config.task.given is None:
        return [], None
    questions = read_task(config.task, cache_dir=config.data.cache_dir, seed=config.data.seed)
    return questions, encode_task(
        questions,
        checkpoint.tokenizer,
        vocab_size=checkpoint.shape.vocab_size,
        max_length=checkpoint.architecture.max_position_embeddings,
        multiple=config.parallel.tensor if config.parallel.sequence_parallel else 1,
    )
