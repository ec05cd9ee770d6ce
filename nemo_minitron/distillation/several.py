"""Distillation from several teachers: NeMo's module with their weighted loss, and the recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from nemo.collections.llm.gpt.model.base import GPTConfig

from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.config import LossConfig, Schedule
from nemo_minitron.data.blocks import Blocks
from nemo_minitron.distillation.compatibility import check_context, check_pair, check_text
from nemo_minitron.distillation.losses.common import CommonTokens
from nemo_minitron.distillation.losses.weighted import weighted_loss
from nemo_minitron.distillation.module import (
    HIDDEN,
    KL,
    DistillationLoss,
    DistillationModel,
    TeacherFirst,
    measured_of,
    teacher_closed,
)
from nemo_minitron.distillation.recipe import check_rounding
from nemo_minitron.distillation.teachers.several import OneOfSeveral, SeveralTeachers, numbered_by_source
from nemo_minitron.distillation.training.language_model import TokenLoss, TrainedModel
from nemo_minitron.distillation.training.loop import optimizer_of, train, trained_config
from nemo_minitron.distillation.training.outputs import Trained, finished
from nemo_minitron.distillation.training.rounding import round_forward
from nemo_minitron.errors import ConfigError
from nemo_minitron.quantization.schemes import Scheme
from nemo_minitron.runtime import versions
from nemo_minitron.runtime.groups import ParallelLayout

if TYPE_CHECKING:
    from nemo.collections.common.tokenizers.tokenizer_spec import TokenizerSpec
    from nemo.lightning.pytorch.optim import OptimizerModule

__all__ = ["SeveralLoss", "SeveralModel", "distill_from_several"]

_SHARE = "share of "
"""Before the name of a teacher's divergence: the share of the tokens that it is of."""


class SeveralModel(DistillationModel):
    """The student, with several teachers.

    Args:
        config, student, layout, loss, optim, tokenizer: as of :class:`DistillationModel`.
        teachers: the models to learn from.
        sources: names of the sources of text, in the order of their numbers in a batch.
    """

    def __init__(
        self,
        config: GPTConfig,
        student: Checkpoint,
        teachers: Sequence[OneOfSeveral],
        sources: Sequence[str],
        layout: ParallelLayout,
        loss: LossConfig | None = None,
        optim: OptimizerModule | None = None,
        tokenizer: TokenizerSpec | None = None,
    ) -> None:
        super().__init__(
            config=config, student=student, teacher=None, layout=layout, loss=loss, optim=optim, tokenizer=tokenizer
        )
        self._several, self._names = list(teachers), list(sources)

    def reinit(self) -> SeveralModel:
        """A further chunk of the student, which shares the teachers."""
        chunk = SeveralModel(self.config, self._initial, self._several, self._names, self._layout, self._loss)
        chunk.balance, chunk._teacher, chunk._root = self.balance, self._teacher, self._root
        chunk.rounding = self.rounding
        return chunk

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Build this rank's part of the student and fill it; with the last chunk, the teachers too."""
        if hasattr(self, "module"):
            return
        TrainedModel.configure_model(self, **versions.virtual_pipeline_stage(vp_stage))
        if (vp_stage or 0) + 1 == (self._layout.virtual_pipeline or 1):
            self._teacher.append(
                SeveralTeachers.load(
                    self._several,
                    self._names,
                    self.groups,
                    dtype=torch.bfloat16 if self.config.bf16 else torch.float32,
                    loss=self._loss,
                    student_rows=self.vocab_size,
                )
            )

    def loss_reduction(self, *, validation: bool) -> TokenLoss:
        """The weighted sum of the divergences; in validation also the language-model loss."""
        return SeveralLoss(self, validation=validation)

    def reported(self, values: Mapping[str, float]) -> dict[str, float]:
        """The divergence from each teacher per token that it teaches; left out where it taught none."""
        reported = {}
        for name, value in values.items():
            if name.startswith(_SHARE):
                continue
            share = values.get(_SHARE + name, 1.0)
            if share > 0:
                reported[name] = value / share
        return reported


class SeveralLoss(DistillationLoss):
    """The weighted loss. Reports ``kl``, the weighted sum of the divergences; ``kl_<name>`` of each teacher; where
    labels take part, ``lm_loss``.
    """

    def measure(self, batch: dict[str, Any], logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See :class:`TokenLoss`."""
        model: SeveralModel = self._model
        teachers, kept = cast("SeveralTeachers", model.teacher), batch[HIDDEN]
        scored = teachers.scored(kept)
        losses = weighted_loss(
            logits,
            list(scored.values()),
            model.groups.tp,
            vocab_size=model.vocab_size,
            loss=model._loss,
            labels=batch["labels"].T if self.validation or model._loss.label_weight else None,
            inplace=not self.validation,
        )
        measured = measured_of(losses)
        divergences = dict(zip(scored, losses.divergences, strict=True))
        for teacher, taught in zip(teachers.teachers, kept.taught, strict=True):
            # The same names in every micro-batch, also where a teacher has nothing to do.
            name = f"{KL}_{teacher.name}"
            mine = taught.to(logits.device).expand(losses.divergence.shape)
            value = divergences.get(teacher.name, torch.zeros_like(losses.divergence))
            measured[name] = torch.where(mine, value, 0.0)
            measured[_SHARE + name] = mine.to(value.dtype)
        return losses.total, measured


def distill_from_several(
    student: Checkpoint,
    teachers: Sequence[OneOfSeveral],
    train_blocks: torch.Tensor | Blocks,
    validation_blocks: torch.Tensor | Blocks,
    *,
    layout: ParallelLayout,
    schedule: Schedule,
    seed: int = 0,
    directory: Path,
    loss: LossConfig | None = None,
    resume: bool = True,
    quantize: Scheme | None = None,
) -> Trained:
    """Train the student on several teachers. Every rank calls it.

    The loss of a token is ``(1 - w) sum_t share_t D(teacher t, student) + w CE``, the shares being those of the source
    of its sequence. Each divergence is over the tokens that the student and that teacher share.

    Args:
        student: initial weights.
        teachers: the models to learn from; ``common`` of each is worked out here.
        train_blocks, validation_blocks: as for :func:`~nemo_minitron.distillation.recipe.distill`; blocks without
            sources are of the source "".
        layout, schedule, seed, directory, loss, resume, quantize: as there.

    Raises:
        CheckpointError: if the tokenizer of a teacher, which is named, turns ordinary text into other ids.
        ConfigError: for ``logits: chunks``.
        DataError: for a block whose source has no teacher, or a token that a teacher does not know.
        MinitronError: see :func:`check_pair` and :func:`~nemo_minitron.distillation.training.loop.train`.
    """
    if resume and (done := finished(directory, schedule.steps)):
        return done
    if schedule.logits != "whole":
        raise ConfigError(f"logits={schedule.logits}: is of a single teacher; use logits=whole")
    sources = list(dict.fromkeys(name for teacher in teachers for name in teacher.shares))
    blocks = {
        what: numbered_by_source(Blocks.of(given), sources, f"the {what} text")
        for what, given in (("training", train_blocks), ("validation", validation_blocks))
    }
    length, known = blocks["training"].sequence_length, []
    for teacher in teachers:
        common = check_pair(
            student,
            teacher.checkpoint,
            layout,
            length,
            teacher_layout=teacher.placement.layout,
            name=f"teacher {teacher.name}",
        )
        check_context(layout, placement=teacher.placement.kind)
        check_text(blocks, common)
        if not common.whole:
            teacher = dataclasses.replace(teacher, common=CommonTokens(common.size, common.left_out))
        known.append(teacher)
    check_rounding(student, layout, quantize)
    model = SeveralModel(
        trained_config(student, layout, schedule), student, known, sources, layout, loss, optim=optimizer_of(schedule)
    )
    measuring = round_forward(model, quantize, directory, resume=resume)
    with teacher_closed(model):
        return train(
            model,
            student,
            blocks["training"],
            blocks["validation"],
            layout=layout,
            schedule=schedule,
            seed=seed,
            directory=directory,
            resume=resume,
            callbacks=[*measuring, TeacherFirst(model)],
            forward=[teacher.checkpoint for teacher in known],
            title="distilling",
        )
