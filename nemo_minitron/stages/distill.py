"""``minitron distill``: train a student on its teacher's logits, with NeMo 2.

Output::

    model/           the distilled model, a plain NeMo 2 checkpoint
    checkpoints/     NeMo's training state, to go on from
    metrics.jsonl    a line a step and a line a validation
    tensorboard/     the same, as NeMo logs it
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from nemo_minitron.config import DistillConfig
from nemo_minitron.distillation.layers import layer_maps
from nemo_minitron.errors import CheckpointError, ConfigError
from nemo_minitron.pruning.kept import load_kept
from nemo_minitron.shape import ModelShape
from nemo_minitron.stages.base import StagePlan, peek_shape
from nemo_minitron.stages.prune import kept_path
from nemo_minitron.stages.training import plan_training, save_model, schedule_of, summary, training_blocks

__all__ = ["plan", "run"]


def plan(config: DistillConfig) -> StagePlan:
    """What :func:`run` would read, write and cost."""
    found = plan_training(config, config.inputs(), "student", "distilled model")
    if not config.taught:
        found.notes.append("loss.label_weight=1: the language-model loss alone; no teacher is read")
        return found
    shapes = {role: peek_shape(path) for role, path in config.inputs().items()}
    if (ours := shapes["student"]) is not None and (theirs := shapes["teacher"]) is not None:
        _plan_intermediate(config, found, ours, theirs)
    return found


def _plan_intermediate(config: DistillConfig, found: StagePlan, student: ModelShape, teacher: ModelShape) -> None:
    """Faults of the intermediate losses with these models, or where each is taken."""
    if not config.intermediate.weights():
        return
    try:
        kept = _kept_layers(config, student, teacher)
        maps = layer_maps(config.intermediate, student, teacher, tensor=config.parallel.tensor, kept_layers=kept)
    except ConfigError as error:
        found.faults += error.faults
        return
    except CheckpointError as error:
        found.faults.append(str(error))
        return
    for name, layers in (("hidden", maps.hidden), ("attention", maps.attention)):
        if layers:
            pairs = ", ".join(f"{ours}-{theirs}" for ours, theirs in sorted(layers.items()))
            found.notes.append(f"{name} loss of the layers (student-teacher) {pairs}")


def _kept_layers(config: DistillConfig, student: ModelShape, teacher: ModelShape) -> tuple[int, ...] | None:
    """The teacher's layers that the student kept, where a record says that it was cut from a model of this shape."""
    path = kept_path(Path(config.student))
    if not path.is_file():
        return None
    kept, source = load_kept(path)
    return kept.layers if (source, kept.target(source)) == (teacher, student) else None


def run(config: DistillConfig) -> dict[str, Any]:
    """Distil. Every rank runs this; rank 0 writes the distilled model.

    Returns:
        See :func:`~nemo_minitron.stages.training.summary`.

    Raises:
        MinitronError: for models, data or a layout that do not fit each other, or a loss that is not finite.
    """
    import torch

    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.distillation.pair import check_model, check_pair
    from nemo_minitron.runtime.groups import ParallelLayout

    student = open_checkpoint(config.student)
    layout = ParallelLayout(**vars(config.parallel))
    training: dict[str, Any] = {"layout": layout, "directory": Path(config.output), "resume": config.resume}
    if not config.taught:
        check_model(student, layout, config.data.sequence_length)
        train, validation = training_blocks(config, student)

        from nemo_minitron.distillation.recipe import correct

        last = correct(student, train, validation, schedule=schedule_of(config), **training)
    else:
        assert config.teacher is not None  # the configuration was checked
        teacher = open_checkpoint(config.teacher)
        check_pair(student, teacher, layout, config.data.sequence_length)
        kept = _kept_layers(config, student.shape, teacher.shape)
        layer_maps(config.intermediate, student.shape, teacher.shape, tensor=layout.tensor, kept_layers=kept)
        train, validation = training_blocks(config, teacher)

        from nemo_minitron.distillation.recipe import distill

        last = distill(
            student,
            teacher,
            train,
            validation,
            schedule=schedule_of(config),
            loss=config.loss,
            intermediate=config.intermediate,
            kept_layers=kept,
            **training,
        )
    if torch.distributed.get_rank() != 0:
        return {}
    lineage = {
        "distilled": {
            "student": config.student,
            "teacher": config.teacher if config.taught else None,
            "tokens": config.tokens,
            "steps": config.steps,
            "loss": dataclasses.asdict(config.loss),
            "intermediate": dataclasses.asdict(config.intermediate),
        }
    }
    save_model(config, student, last, lineage)
    return summary(Path(config.output) / "metrics.jsonl")
