"""Several teachers of a distillation: their part of the plan, and their training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo_minitron.config import DistillConfig, ParallelLayout
from nemo_minitron.jobs.plans import StagePlan
from nemo_minitron.stages.shared.training import plan_training, training_blocks
from nemo_minitron.stages.shared.vocabulary import plan_pair_vocabulary

if TYPE_CHECKING:
    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.distillation.training.outputs import Trained

__all__ = ["plan_several", "roles", "several_lineage", "train_on_several"]


def roles(config: DistillConfig) -> dict[str, str]:
    """The path of each model by its role: "student", "teacher <name>"."""
    return {"student": config.student, **{f"teacher {teacher.name}": teacher.model for teacher in config.teachers}}


def plan_several(config: DistillConfig) -> StagePlan:
    """What a distillation from several teachers would read, write and cost."""
    paths = roles(config)
    layouts: dict[str, ParallelLayout] = {
        f"teacher {teacher.name}": teacher.parallel for teacher in config.teachers if teacher.placement == "own_layout"
    }
    plan = plan_training(config, paths, {"student"}, "distilled model", layouts)
    shares = config.teacher_shares()
    by_source = any(len(share) < len(config.data.all_sources()) for share in shares.values())
    for name, share in shares.items():
        listed = ", ".join(f"{source} {part:.3g}" for source, part in share.items())
        plan.notes.append(f"teacher {name}: its share of the loss, by source: {listed or 'none'}")
    if by_source and plan.flops:
        plan.notes.append("FLOPs are those of every teacher over all tokens; each runs the micro-batches it teaches in")
    for role, path in paths.items():
        if role != "student":
            plan_pair_vocabulary(plan, config.student, path, name=role)
    return plan


def several_lineage(config: DistillConfig) -> list[dict[str, Any]]:
    """What the distilled model's lineage says of its teachers."""
    shares = config.teacher_shares()
    return [
        {"name": teacher.name, "model": teacher.model, "shares": shares[teacher.name]} for teacher in config.teachers
    ]


def train_on_several(config: DistillConfig, student: Checkpoint, training: dict[str, Any]) -> Trained:
    """Train the student.

    Args:
        config: of the stage.
        student: initial weights.
        training: arguments of :func:`~nemo_minitron.distillation.several.distill_from_several` that do not depend on
            the teachers.
    """
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.distillation.compatibility import check_pair
    from nemo_minitron.distillation.teachers.placement import TeacherPlacement

    layout, length = config.parallel, config.data.sequence_length
    checkpoints, cut_alike = [], True
    for teacher in config.teachers:
        own = teacher.parallel if teacher.placement == "own_layout" else None
        checkpoint = open_checkpoint(teacher.model)
        common = check_pair(student, checkpoint, layout, length, teacher_layout=own, name=f"teacher {teacher.name}")
        checkpoints.append((checkpoint, TeacherPlacement(teacher.placement, own)))
        cut_alike = cut_alike and common.cuts_alike
    train, validation = training_blocks(config, checkpoints[0][0] if cut_alike else student)

    from nemo_minitron.distillation.several import distill_from_several
    from nemo_minitron.distillation.teachers.several import OneOfSeveral

    shares = config.teacher_shares()
    teachers = [
        OneOfSeveral(teacher.name, checkpoint, shares[teacher.name], placement)
        for teacher, (checkpoint, placement) in zip(config.teachers, checkpoints, strict=True)
    ]
    return distill_from_several(student, teachers, train, validation, loss=config.loss, **training)
