"""The recipes: distillation of a student, and correction of a teacher on the distillation data.

Both call :func:`~nemo_minitron.distillation.training.loop.train` on a model with its loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.tokenizer.comparison import Vocabulary
from nemo_minitron.config import CorrectionConfig, IntermediateConfig, LossConfig, Schedule
from nemo_minitron.data.blocks import Blocks
from nemo_minitron.distillation.compatibility import (
    announce,
    check_context,
    check_model,
    check_pair,
    check_text,
    common_with_cache,
)
from nemo_minitron.distillation.module import DistillationModel, TeacherFirst, teacher_closed
from nemo_minitron.distillation.on_policy import AnswersFirst, OnPolicyModel
from nemo_minitron.distillation.own_answers import OnPolicy, check_on_policy
from nemo_minitron.distillation.teachers.learning import CorrectTeacher
from nemo_minitron.distillation.teachers.placement import TeacherPlacement
from nemo_minitron.distillation.training.language_model import LanguageModel
from nemo_minitron.distillation.training.loop import optimizer_config, optimizer_of, train, trained_config
from nemo_minitron.distillation.training.outputs import Trained, finished
from nemo_minitron.distillation.training.rounding import round_forward
from nemo_minitron.errors import ShapeError
from nemo_minitron.quantization.matrices import training_faults
from nemo_minitron.quantization.schemes import Scheme
from nemo_minitron.runtime.groups import ParallelLayout

__all__ = ["Schedule", "Trained", "check_rounding", "correct", "distill"]


def distill(
    student: Checkpoint,
    teacher: Checkpoint | None,
    train_blocks: torch.Tensor | Blocks,
    validation_blocks: torch.Tensor | Blocks,
    *,
    layout: ParallelLayout,
    schedule: Schedule,
    seed: int = 0,
    directory: Path,
    loss: LossConfig | None = None,
    intermediate: IntermediateConfig | None = None,
    resume: bool = True,
    kept_layers: Sequence[int] | None = None,
    placement: TeacherPlacement | None = None,
    correction: CorrectionConfig | None = None,
    quantize: Scheme | None = None,
    on_policy: OnPolicy | None = None,
) -> Trained:
    """Train the student on the teacher. Every rank of the student calls it.

    Args:
        student: initial weights.
        teacher: the model to learn from; None where a cache takes its place.
        train_blocks, validation_blocks: ``[n, s + 1]`` token blocks, or blocks that say which documents they hold; the
            same on every rank. Student and teacher must know all of their tokens.
        layout: of the student, and of the teacher unless it has its own.
        schedule: hyper-parameters.
        seed: of the order of repeated passes over the data.
        directory: gets ``checkpoints/``, ``best/`` if asked for, ``tensorboard/`` and ``metrics.jsonl``.
        loss: of a token's logits; None for forward KL at temperature 1.
        intermediate: losses of the states inside the models; None for none.
        resume: go on from the last whole checkpoint in ``directory``; there is nothing to do if it is of the last step.
        kept_layers: the layers that a student pruned from this teacher kept; they give the default layer map of the
            intermediate losses.
        placement: where the teacher runs, or its cache; None for the student's ranks and layout. Ranks of the teacher's
            own call :func:`~nemo_minitron.distillation.teachers.own_ranks.serve_teacher` at the same time.
        correction: if it gives a learning rate, the teacher is trained on the labels during the distillation; it must
            then be on the student's ranks, in the same layout.
        quantize: the student is trained for this quantization: its matrices are rounded forward.
        on_policy: the student writes a share of the training sequences itself; None, or a share of 0, for none.

    Raises:
        MinitronError: see :func:`check_pair` and :func:`~nemo_minitron.distillation.training.loop.train`.
    """
    if resume and (done := finished(directory, schedule.steps)):
        return done
    placement = placement or TeacherPlacement()
    blocks = {"training": Blocks.of(train_blocks), "validation": Blocks.of(validation_blocks)}
    length = blocks["training"].sequence_length
    if teacher is not None:
        common = check_pair(student, teacher, layout, length, teacher_layout=placement.layout)
    else:
        assert placement.cache is not None, "where there is no teacher, a cache takes its place"
        check_model(student, layout, length)
        common = common_with_cache(Vocabulary.of("student", student), placement.cache)
        announce(common, student.path)
    check_text(blocks, common)
    check_context(layout, placement=placement.kind)
    check_rounding(student, layout, quantize)
    learning = None if correction is None or correction.lr is None else _learning(correction, schedule)
    own = on_policy if on_policy is not None and on_policy.config.share else None
    if own is not None:
        others = {
            "a logit cache, which does not know the answers": teacher is None,
            "loss.label_weight": loss is not None and loss.label_weight > 0,
            "intermediate losses": intermediate is not None and intermediate.weights(),
            "a teacher that is trained": learning,
            "quantize": quantize,
            "context or expert parallelism": layout.context > 1 or layout.expert > 1,
            "logits=chunks and weights of stale answers": own.config.reweighted and schedule.logits == "chunks",
        }
        check_on_policy(common, others)
    model = (OnPolicyModel if own else DistillationModel)(
        trained_config(student, layout, schedule),
        student,
        teacher,
        layout,
        loss,
        intermediate,
        kept_layers,
        placement,
        learning,
        common,
        chunked=schedule.logits == "chunks",
        optim=optimizer_of(schedule),
    )
    measuring = round_forward(model, quantize, directory, resume=resume)
    answers: list[AnswersFirst] = []
    if isinstance(model, OnPolicyModel) and own is not None:
        model.on_policy = own
        answers = [
            AnswersFirst(
                model,
                steps=schedule.steps,
                global_batch_size=schedule.global_batch_size,
                sequence_length=length,
                common=common,
            )
        ]
    with teacher_closed(model):
        return train(
            model,
            student,
            train_blocks,
            validation_blocks,
            layout=layout,
            schedule=schedule,
            seed=seed,
            directory=directory,
            resume=resume,
            callbacks=[*measuring, *answers, TeacherFirst(model), *([CorrectTeacher(model)] if learning else [])],
            numbered=bool(answers),
            forward=[] if teacher is None else [teacher] * (3 if learning else 1),
            title="distilling",
        )


def check_rounding(student: Checkpoint, layout: ParallelLayout, quantize: Scheme | None) -> None:
    """Check that a student can be trained for a quantization under a layout.

    Raises:
        ShapeError: with all that is in the way.
    """
    if quantize is None:
        return
    if faults := training_faults(student.shape, student.architecture, quantize, tensor=layout.tensor):
        raise ShapeError(faults)


def _learning(correction: CorrectionConfig, schedule: Schedule) -> dict[str, Any]:
    """Settings of a :class:`LearningTeacher`."""
    assert correction.lr is not None
    own = replace(schedule, lr=correction.lr, min_lr=correction.min_lr)
    return {
        "optimizer": optimizer_config(own),
        "min_lr": own.min_lr,
        "warmup_steps": own.warmup(),
        "steps": own.steps,
        "chunked": own.logits == "chunks",
    }


def correct(
    initial: Checkpoint,
    train_blocks: torch.Tensor | Blocks,
    validation_blocks: torch.Tensor | Blocks,
    *,
    layout: ParallelLayout,
    schedule: Schedule,
    seed: int = 0,
    directory: Path,
    resume: bool = True,
    quantize: Scheme | None = None,
) -> Trained:
    """Train a model on the labels of the data, by the vocabulary-parallel cross-entropy. Every rank calls it.

    For a teacher this is the correction of arXiv 2408.11796, section 2; for a student it is training without a teacher.

    Args:
        initial: weights to start from.
        train_blocks, validation_blocks, layout, schedule, seed, directory, resume, quantize: as for :func:`distill`.

    Raises:
        MinitronError: see :func:`check_model` and :func:`~nemo_minitron.distillation.training.loop.train`.
    """
    if resume and (done := finished(directory, schedule.steps)):
        return done
    check_model(initial, layout, Blocks.of(train_blocks).sequence_length)
    check_rounding(initial, layout, quantize)
    config, chunked = trained_config(initial, layout, schedule), schedule.logits == "chunks"
    model = LanguageModel(config, initial, layout, chunked, optim=optimizer_of(schedule))
    return train(
        model,
        initial,
        train_blocks,
        validation_blocks,
        layout=layout,
        schedule=schedule,
        seed=seed,
        directory=directory,
        resume=resume,
        callbacks=round_forward(model, quantize, directory, resume=resume),
        title="correcting",
    )
