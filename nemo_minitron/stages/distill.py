"""``minitron distill``: train a student on its teacher's logits, with NeMo 2.

Output::

    model/           the distilled model, a plain NeMo 2 checkpoint
    checkpoints/     NeMo's training state, to go on from
    trained_quantization.json   with quantize: what the student is trained for; in model/ too
    best/            weights of the best validation, with keep_best
    metrics.jsonl    a line per step and a line per validation
    tensorboard/     the same, as NeMo logs it
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron import axes
from nemo_minitron.checkpoints.model_record import peek_architecture, peek_shape
from nemo_minitron.config import DistillConfig
from nemo_minitron.distillation.losses.layer_maps import layer_maps
from nemo_minitron.distillation.training.outputs import finished
from nemo_minitron.errors import CheckpointError, ConfigError
from nemo_minitron.jobs.plans import PlannedPath, StagePlan
from nemo_minitron.pruning.kept import kept_path, load_kept
from nemo_minitron.quantization.matrices import matrices_of, training_faults
from nemo_minitron.quantization.ranges import TrainedFor
from nemo_minitron.quantization.schemes import Scheme, scheme_of
from nemo_minitron.shape import ModelShape
from nemo_minitron.stages.shared.prompts import open_on_policy, plan_on_policy
from nemo_minitron.stages.shared.teachers import plan_several, several_lineage, train_on_several
from nemo_minitron.stages.shared.training import (
    is_main,
    plan_training,
    save_model,
    summary,
    training_blocks,
)
from nemo_minitron.stages.shared.vocabulary import plan_cached_vocabulary, plan_pair_vocabulary

if TYPE_CHECKING:
    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.data import Blocks
    from nemo_minitron.distillation.teachers.placement import TeacherPlacement
    from nemo_minitron.distillation.training.outputs import Trained
    from nemo_minitron.runtime.groups import ParallelLayout

__all__ = ["plan", "run"]


def plan(config: DistillConfig) -> StagePlan:
    """What :func:`run` would read, write and cost."""
    if config.teachers and config.taught:
        plan = plan_several(config)
        _plan_rounding(config, plan)
        return plan
    paths = config.inputs()
    cache = paths.pop("teacher_cache", None)
    paths.pop("on_policy.prompts.path", None)
    if cache is not None:
        paths.pop("teacher", None)  # compared, not run
    layouts = {} if config.teacher_placement == "shared" else {"teacher": config.teacher_parallel}
    trained = {"student"} if config.teacher_correction.lr is None else {"student", "teacher"}
    apart = config.teacher_placement == "own_ranks"
    plan = plan_training(config, paths, trained, "distilled model", layouts, apart=apart)
    _plan_rounding(config, plan)
    plan_on_policy(config, plan)
    if not config.taught:
        plan.notes.append("loss.label_weight=1: the language-model loss alone; no teacher is read")
        return plan
    if cache is not None:
        plan.reads.append(PlannedPath(cache, "logit cache"))
        plan_cached_vocabulary(plan, config.student, cache)
        return plan
    plan_pair_vocabulary(plan, config.student, paths["teacher"])
    if apart:
        count = config.teacher_parallel.world_size
        plan.notes.append(f"the teacher has {count} {'process' if count == 1 else 'processes'} of its own")
    shapes = {role: peek_shape(path) for role, path in paths.items()}
    student_shape, teacher_shape = shapes["student"], shapes["teacher"]
    if student_shape is not None and teacher_shape is not None and student_shape.uniform and teacher_shape.uniform:
        _plan_intermediate(config, plan, student_shape, teacher_shape)
    return plan


def _scheme(config: DistillConfig) -> Scheme | None:
    """What the student is trained for; None for a float model."""
    return None if config.quantize is None else scheme_of(config.quantize, config.group_size)


def _plan_rounding(config: DistillConfig, plan: StagePlan) -> None:
    """Faults of the quantization that the student is trained for, and what stays as it is."""
    scheme, shape, architecture = _scheme(config), peek_shape(config.student), peek_architecture(config.student)
    if scheme is None:
        return
    plan.notes.append(f"the student is trained for {scheme.title}: minitron export quantize=[{scheme.name}]")
    if shape is None or architecture is None or not shape.uniform:
        return
    faults = training_faults(shape, architecture, scheme, tensor=config.parallel.tensor)
    plan.faults += faults
    if not faults and (note := matrices_of(axes.family(architecture.family), shape, scheme).note()):
        plan.notes.append(f"{scheme.name}: {note}")


def _plan_intermediate(config: DistillConfig, plan: StagePlan, student: ModelShape, teacher: ModelShape) -> None:
    """Faults of the intermediate losses with these models, or the layers of each loss."""
    if not config.intermediate.weights():
        return
    try:
        kept = _kept_layers(config, student, teacher)
        maps = layer_maps(config.intermediate, student, teacher, tensor=config.parallel.tensor, kept_layers=kept)
    except ConfigError as error:
        plan.faults += error.faults
        return
    except CheckpointError as error:
        plan.faults.append(str(error))
        return
    for name, layers in (("hidden", maps.hidden), ("attention", maps.attention)):
        if layers:
            pairs = ", ".join(f"{ours}-{theirs}" for ours, theirs in sorted(layers.items()))
            plan.notes.append(f"{name} loss of the layers (student-teacher) {pairs}")


def _kept_layers(config: DistillConfig, student: ModelShape, teacher: ModelShape) -> tuple[int, ...] | None:
    """The teacher's layers that the student kept, if a record says that it was pruned from a model of this shape."""
    path = kept_path(Path(config.student))
    if not path.is_file():
        return None
    kept, source = load_kept(path)
    return kept.layers if (source, kept.target(source)) == (teacher, student) else None


def run(config: DistillConfig) -> dict[str, Any]:
    """Distil. Every rank runs this; rank 0 writes the distilled model.

    Returns:
        See :func:`~nemo_minitron.stages.shared.training.summary`; an empty mapping on separate teacher ranks.

    Raises:
        MinitronError: for models, a cache, data or a layout that do not fit each other, or a loss that is not finite.
    """
    from nemo_minitron.checkpoints import open_checkpoint

    student, output = open_checkpoint(config.student), Path(config.output)
    # Killed after its last step, a training has only its model to write.
    trained = finished(output, config.steps) if config.resume else None
    trained = trained or _train(config, student)
    if trained is None or not is_main():
        return {}
    lineage: dict[str, Any] = {
        "distilled": {
            "student": config.student,
            "teacher": config.teacher if config.taught else None,
            "tokens": config.tokens,
            "steps": config.steps,
            "teacher_cache": config.teacher_cache if config.taught else None,
            "loss": dataclasses.asdict(config.loss),
            "intermediate": dataclasses.asdict(config.intermediate),
            "teacher_correction": dataclasses.asdict(config.teacher_correction),
        }
    }
    if config.teachers and config.taught:
        lineage["distilled"]["teachers"] = several_lineage(config)
    if config.quantize is not None:
        lineage["distilled"]["quantize"] = {"scheme": config.quantize, "group_size": config.group_size}
    if config.on_policy.share:
        lineage["distilled"]["on_policy"] = dataclasses.asdict(config.on_policy)
    save_model(config, student, trained, lineage)
    if (trained_for := TrainedFor.read(output)) is not None and config.quantize is not None:
        trained_for.write(output / "model")
    return summary(output / "metrics.jsonl")


def _train(config: DistillConfig, student: Checkpoint) -> Trained | None:
    """Train the student. A rank that runs only the teacher serves it until the training ends, and returns None."""
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.checkpoints.tokenizer.comparison import Vocabulary
    from nemo_minitron.distillation.compatibility import announce, check_model, check_pair, common_with_cache

    teacher = None
    layout = config.parallel
    training: dict[str, Any] = {
        "layout": layout,
        "schedule": config,
        "seed": config.runtime.seed,
        "directory": Path(config.output),
        "resume": config.resume,
        "quantize": _scheme(config),
    }
    if not config.taught:
        check_model(student, layout, config.data.sequence_length)
        train, validation = training_blocks(config, student)

        from nemo_minitron.distillation.recipe import correct

        return correct(student, train, validation, **training)
    if config.teachers:
        return train_on_several(config, student, training)
    kept, own, placement = None, None, _placement(config)
    if placement.cache is not None:
        check_model(student, layout, config.data.sequence_length)
        common = common_with_cache(Vocabulary.of("student", student), placement.cache)
        announce(common, student.path)
        train, validation = training_blocks(config, student)
        _check_cache(config, placement.cache, {"training": train, "validation": validation})
    else:
        assert config.teacher is not None  # the configuration was checked
        teacher = open_checkpoint(config.teacher)
        common = check_pair(student, teacher, layout, config.data.sequence_length, teacher_layout=placement.layout)
        kept = _kept_layers(config, student.shape, teacher.shape)
        layer_maps(config.intermediate, student.shape, teacher.shape, tensor=layout.tensor, kept_layers=kept)
        if _is_teacher_rank(layout, placement):
            _serve_teacher(config, teacher, student.shape.vocab_size, placement)
            return None
        own = open_on_policy(config, student)
        train, validation = training_blocks(config, teacher if common.cuts_alike else student)

    from nemo_minitron.distillation.recipe import distill

    return distill(
        student,
        teacher,
        train,
        validation,
        loss=config.loss,
        intermediate=config.intermediate,
        kept_layers=kept,
        placement=placement,
        correction=config.teacher_correction,
        on_policy=own,
        **training,
    )


def _placement(config: DistillConfig) -> TeacherPlacement:
    from nemo_minitron.distillation.teachers.placement import TeacherPlacement

    return TeacherPlacement(
        config.teacher_placement,
        None if config.teacher_placement == "shared" else config.teacher_parallel,
        None if config.teacher_cache is None else Path(config.teacher_cache),
        timeout_minutes=max(60.0, config.runtime.collective_timeout_minutes),
    )


def _is_teacher_rank(layout: ParallelLayout, placement: TeacherPlacement) -> bool:
    """Whether this process is one of the ranks that run only the teacher."""
    if placement.kind != "own_ranks":
        return False
    from nemo_minitron.distillation.teachers.own_ranks import becomes_teacher

    assert placement.layout is not None
    return becomes_teacher(layout, placement.layout)


def _serve_teacher(config: DistillConfig, teacher: Checkpoint, student_rows: int, placement: TeacherPlacement) -> None:
    """Serve the teacher's logits to the student's ranks, until the training ends."""
    import torch

    from nemo_minitron.distillation.teachers.own_ranks import serve_teacher
    from nemo_minitron.distillation.training.outputs import finished

    assert placement.layout is not None
    if config.resume and finished(Path(config.output), config.steps):
        return  # the student's ranks have nothing to ask for
    serve_teacher(
        teacher,
        config.parallel,
        placement.layout,
        dtype=torch.bfloat16 if config.precision.startswith("bf16") else torch.float32,
        timeout_minutes=placement.timeout_minutes,
        seed=config.runtime.seed,
        student_rows=student_rows,
    )


def _check_cache(config: DistillConfig, cache: Path, blocks: dict[str, Blocks]) -> None:
    """Check that a cache fits the configured teacher (if any) and these blocks.

    Raises:
        DataError: with all differences, or the number of missing samples.
        ConfigError: for a loss that cannot be computed from the cache.
    """
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.checkpoints.fingerprint import model_fingerprint
    from nemo_minitron.distillation.teachers.cached import cached_loss
    from nemo_minitron.distillation.teachers.documents import block_starts
    from nemo_minitron.distillation.teachers.logit_cache import LogitCache, sample_keys

    logits = LogitCache(cache)
    logits.check(
        sequence_length=config.data.sequence_length,
        teacher=None if config.teacher is None else model_fingerprint(open_checkpoint(config.teacher)),
    )
    cached_loss(config.loss, logits.manifest)
    for split, part in blocks.items():
        logits.require(sample_keys(*block_starts(part)), what=f"the {split} blocks")
