"""Stages that train on text: a student with its teacher, and a model by itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from omegaconf import MISSING

from nemo_minitron.config.parts import (
    DataConfig,
    IntermediateConfig,
    LossConfig,
    ParallelConfig,
    choice,
    not_negative,
    positive,
)
from nemo_minitron.config.stages.base import StageConfig


@dataclass
class TrainingConfig(StageConfig):
    """What every training on text has.

    Attributes:
        data: training text; its held-out split validates.
        steps: optimizer steps.
        micro_batch_size: blocks of one forward pass on one data-parallel rank.
        global_batch_size: blocks of one optimizer step.
        lr, min_lr, warmup_steps: linear warm-up to ``lr``, then cosine decay to ``min_lr`` at ``steps``.
        weight_decay, beta1, beta2, clip_grad: AdamW and the gradient norm it is clipped to (0 for no clipping).
        max_minutes: stop in good order when this time is used up; null for no limit.
        validate_every, validation_batches: steps between validations, global batches of each.
        log_every, save_every: steps between metrics and between checkpoints.
        resume: go on from the last checkpoint in ``output``.
        precision: "32" or "bf16-mixed".
        parallel: layout of the models.
    """

    data: DataConfig = field(default_factory=DataConfig)
    steps: int = 300
    micro_batch_size: int = 1
    global_batch_size: int = 8
    lr: float = 1e-4
    min_lr: float = 1e-5
    warmup_steps: int = 10
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_grad: float = 1.0
    max_minutes: float | None = None
    validate_every: int = 50
    validation_batches: int = 8
    log_every: int = 1
    save_every: int = 100
    resume: bool = True
    precision: str = "32"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def tokens(self) -> int:
        """Tokens that the whole training sees."""
        return self.steps * self.global_batch_size * self.data.sequence_length

    def faults(self) -> list[str]:
        """Ranges, a batch that does not divide, a schedule that does not fit."""
        found = [
            *positive(
                self, "steps", "micro_batch_size", "global_batch_size", "lr", "max_minutes",
                "validate_every", "validation_batches", "log_every", "save_every",
            ),
            *not_negative(self, "min_lr", "warmup_steps", "weight_decay", "clip_grad"),
            *choice(self, "precision", ("32", "bf16-mixed")),
            *(f"{b}: must lie in [0, 1)" for b in ("beta1", "beta2") if not 0 <= getattr(self, b) < 1),
        ]  # fmt: skip
        if self.min_lr > self.lr:
            found.append(f"min_lr={self.min_lr}: lies above lr={self.lr}")
        if self.warmup_steps > 0 and self.warmup_steps >= self.steps > 0:
            found.append(f"warmup_steps={self.warmup_steps}: leaves nothing of steps={self.steps}")
        one_pass = self.micro_batch_size * self.parallel.data
        if one_pass > 0 and self.global_batch_size > 0 and self.global_batch_size % one_pass:
            found.append(
                f"global_batch_size={self.global_batch_size}: is not a multiple of "
                f"micro_batch_size * parallel.data = {one_pass}"
            )
        elif one_pass > 0 and self.parallel.virtual_pipeline and self.parallel.pipeline > 0:
            passes = self.global_batch_size // one_pass
            if passes % self.parallel.pipeline:
                found.append(
                    f"global_batch_size={self.global_batch_size}: makes {passes} micro-batches a rank; virtual "
                    f"pipeline stages need a multiple of parallel.pipeline={self.parallel.pipeline}"
                )
        return found


@dataclass
class CorrectConfig(TrainingConfig):
    """Train a model on the text itself, by the language-model loss.

    Of a teacher before distillation this is teacher correction (arXiv 2408.11796, section 2): it learns the
    distribution of the data that it is going to teach on.

    Attributes:
        model: checkpoint.
    """

    STAGE: ClassVar[str] = "correct"
    INPUTS: ClassVar[tuple[str, ...]] = ("model",)

    model: str = MISSING


@dataclass
class DistillConfig(TrainingConfig):
    """Train a student on its teacher's logits (Minitron, arXiv 2407.14679, section 3).

    Attributes:
        student: checkpoint.
        teacher: checkpoint; may be null where nothing is learnt from it (``loss.label_weight=1`` and no intermediate
            losses), and is not read then.
        loss: of a token's logits.
        intermediate: losses of the states inside the models; none by default.
    """

    STAGE: ClassVar[str] = "distill"
    INPUTS: ClassVar[tuple[str, ...]] = ("student", "teacher")

    student: str = MISSING
    teacher: str | None = MISSING
    loss: LossConfig = field(default_factory=LossConfig)
    intermediate: IntermediateConfig = field(default_factory=IntermediateConfig)

    @property
    def taught(self) -> bool:
        """Whether anything is learnt from the teacher."""
        return self.loss.label_weight < 1 or bool(self.intermediate.weights())

    def inputs(self) -> dict[str, str]:
        """The teacher counts only where it is read."""
        found = super().inputs()
        return found if self.taught else {name: path for name, path in found.items() if name != "teacher"}

    def faults(self) -> list[str]:
        """Those of every training, and a teacher that is lacking."""
        found = super().faults()
        if self.teacher is None and self.taught:
            found.append(
                "teacher=null: there is something to learn from it; name a checkpoint, or train on the labels alone "
                "with loss.label_weight=1 and no intermediate losses"
            )
        return found
