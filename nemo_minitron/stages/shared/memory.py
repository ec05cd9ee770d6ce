"""Memory of a rank in the plans of stages, by the formulas of :mod:`nemo_minitron.planning.memory`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from nemo_minitron.checkpoints.model_record import peek_architecture, peek_shape
from nemo_minitron.config import ParallelLayout, RuntimeConfig
from nemo_minitron.jobs.plans import human_bytes
from nemo_minitron.planning import MemoryCost, MemoryUse, Model, Workload

__all__ = ["cache_of_rank", "planned_model", "training_of_rank", "training_use", "weights_of_rank"]


class Running(Protocol):
    """Settings of a stage that runs models."""

    parallel: ParallelLayout
    runtime: RuntimeConfig


class Training(Running, Protocol):
    """Settings of a stage that trains."""

    micro_batch_size: int
    global_batch_size: int
    precision: str


def planned_model(path: str) -> Model | None:
    """What the record of a checkpoint says of its model; None where there is none yet."""
    shape, architecture = peek_shape(path), peek_architecture(path)
    return None if shape is None or architecture is None else Model(shape, architecture)


def weights_of_rank(config: Running, *models: str) -> str:
    """Memory of the largest of the models' weights on the fullest rank; their records are there."""
    return f"about {human_bytes(max(use.weights for use in _inference(config, models)))}"


def cache_of_rank(config: Running, model: str, *, batch_size: int, length: int) -> float:
    """Bytes of the keys and values of so many sequences of a length on the fullest rank."""
    return max(use.cache for use in _inference(config, [model], batch_size=batch_size, sequence_length=length))


def training_use(
    config: Training, model: Model, sequence_length: int, *, sequences: int = 1, teachers: Sequence[Model] = ()
) -> list[MemoryUse]:
    """Memory of one rank of each pipeline stage.

    Args:
        config: of the stage.
        model: that is trained.
        sequence_length: tokens of a sample.
        sequences: of a sample; a pair has two.
        teachers: that run on the same ranks.
    """
    fused = config.runtime.device != "cpu"
    work = Workload.on(
        config.parallel,
        training=True,
        batch_size=config.micro_batch_size * sequences,
        sequence_length=sequence_length,
        bytes=_bytes(config.precision),
        recompute=getattr(config, "recompute", "none"),
        chunked=getattr(config, "logits", "whole") == "chunks",
        fused=fused,
        micro_batches=max(1, config.global_batch_size // (config.micro_batch_size * config.parallel.data)),
    )
    return MemoryCost.of(model, work, *teachers).ranks(model.shape)


def training_of_rank(
    config: Training,
    models: dict[str, Model],
    trained: set[str],
    sequence_length: int,
    layouts: dict[str, ParallelLayout],
    *,
    apart: bool,
) -> str:
    """Memory of the fullest rank of a training on text.

    Args:
        config: of the stage.
        models: by their roles.
        trained: the roles that are trained; any other runs forward.
        sequence_length: tokens of a block.
        layouts: of roles whose models are not laid out as the trained one is.
        apart: these have ranks of their own.
    """
    stages = [0.0] * config.parallel.pipeline
    teachers = [model for role, model in models.items() if role not in trained and role not in layouts]
    for role in sorted(trained - layouts.keys()):
        uses = training_use(config, models[role], sequence_length, teachers=teachers)
        stages = [bytes_ + use.total for bytes_, use in zip(stages, uses, strict=True)]
        teachers = []  # counted
    others = {}
    for role, layout in layouts.items():
        if role in models:
            work = Workload.on(layout, batch_size=0, bytes=_bytes(config.precision))
            others[role] = MemoryCost.of(models[role], work)(models[role].shape)
    if not apart:
        return f"about {human_bytes(max(stages) + sum(others.values()))}"
    theirs = "".join(f"; of the {role}'s own ranks {human_bytes(weights)}" for role, weights in others.items())
    return f"about {human_bytes(max(stages))}{theirs}"


def _bytes(precision: str) -> int:
    return 2 if precision.startswith("bf16") else 4


def _inference(
    config: Running, models: Sequence[str], *, batch_size: int = 0, sequence_length: int = 0
) -> list[MemoryUse]:
    """Of all ranks of all models whose records are there."""
    work = Workload.on(
        config.parallel,
        batch_size=batch_size,
        sequence_length=sequence_length,
        bytes=2 if config.runtime.dtype == "bfloat16" else 4,
    )
    return [
        use
        for model in map(planned_model, models)
        if model is not None
        for use in MemoryCost.of(model, work).ranks(model.shape)
    ]
