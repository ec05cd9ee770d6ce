"""Stages that train on text: a student with its teacher, and a model by itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from omegaconf import MISSING

from nemo_minitron.config.parts import (
    RECOMPUTE,
    TEACHER_PLACEMENTS,
    CorrectionConfig,
    DataConfig,
    IntermediateConfig,
    LossConfig,
    ParallelLayout,
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
        lr: peak learning rate, reached by a linear warm-up and followed by a cosine decay.
        min_lr: learning rate at the last step.
        warmup_steps: steps of the linear warm-up.
        weight_decay: weight decay of AdamW.
        beta1, beta2: AdamW's coefficients of the running averages of the gradient and of its square.
        clip_grad: norm that gradients are clipped to; 0 for no clipping.
        max_minutes: stop in good order when this time is used up; null for no limit.
        validate_every: steps between validations.
        validation_batches: global batches of one validation.
        log_every: steps between two lines of metrics.
        save_every: steps between checkpoints.
        keep_best: beside the last checkpoint, keep the weights of the validation with the lowest "kl" or "lm_loss";
            null keeps none.
        result: which of them becomes the stage's model, "last" or "best".
        resume: go on from the last checkpoint in ``output``, under the same settings; layout, micro-batches, time limit
            and intervals may change.
        precision: "32" or "bf16-mixed".
        recompute: activations that the backward pass computes again instead of keeping them: "none", "selective" (the
            core of the attention) or "full" (whole layers; not with intermediate losses).
        parallel: layout of the models.
    """

    CONTEXT_PARALLEL: ClassVar[tuple[str, ...]] = ("parallel",)
    GOES_ON_WITH: ClassVar[tuple[str, ...] | None] = (
        "parallel", "micro_batch_size", "recompute", "max_minutes", "log_every", "save_every", "validate_every",
        "result", "data.workers", "teacher_placement", "teacher_parallel",
    )  # fmt: skip

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
    keep_best: str | None = None
    result: str = "last"
    resume: bool = True
    precision: str = "32"
    recompute: str = "none"
    parallel: ParallelLayout = field(default_factory=ParallelLayout)

    @property
    def validated(self) -> tuple[str, ...]:
        """What a validation measures."""
        return ("lm_loss",)

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
            *choice(self, "recompute", RECOMPUTE),
            *choice(self, "keep_best", self.validated),
            *choice(self, "result", ("last", "best")),
            *(f"{b}: must lie in [0, 1)" for b in ("beta1", "beta2") if not 0 <= getattr(self, b) < 1),
        ]  # fmt: skip
        if self.result == "best" and self.keep_best is None:
            found.append(f"result=best: none is kept; set keep_best to one of {', '.join(self.validated)}")
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
        found += self.parallel.sequence_faults(self.data.sequence_length)
        if self.parallel.context > 1 and self.data.documents == "mask":
            found.append(
                f"parallel.context={self.parallel.context}: Transformer Engine's attention takes no masks of documents "
                "where sequences are shared out; set data.documents=join, or parallel.context=1"
            )
        return found


@dataclass
class CorrectConfig(TrainingConfig):
    """Train a model on the text itself, by the language-model loss.

    Of a teacher before distillation this is teacher correction (arXiv 2408.11796, section 2): it learns the
    distribution of the data that it is going to teach on.

    Attributes:
        model: checkpoint to train.
    """

    STAGE: ClassVar[str] = "correct"
    INPUTS: ClassVar[tuple[str, ...]] = ("model",)

    model: str = MISSING


@dataclass
class DistillConfig(TrainingConfig):
    """Train a student on its teacher's logits (Minitron, arXiv 2407.14679, section 3).

    Attributes:
        student: checkpoint to train.
        teacher: checkpoint to learn from; may be null where nothing is learnt from it (``loss.label_weight=1`` and no
            intermediate losses), and is not read then, or with a cache.
        teacher_cache: output of ``minitron cache``, whose logits take the teacher's place; a teacher that is named too
            is only compared with the one that was cached.
        teacher_placement: "shared" (the student's ranks and layout), "own_layout" (the same ranks, laid out by
            ``teacher_parallel``) or "own_ranks" (``teacher_parallel`` further processes).
        teacher_parallel: layout of a teacher that has its own.
        loss: the loss of a token's logits.
        intermediate: losses of the states inside the models; none by default.
        teacher_correction: train the teacher on the labels meanwhile; off by default.
    """

    STAGE: ClassVar[str] = "distill"
    INPUTS: ClassVar[tuple[str, ...]] = ("student", "teacher", "teacher_cache")

    student: str = MISSING
    teacher: str | None = MISSING
    teacher_cache: str | None = None
    teacher_placement: str = "shared"
    teacher_parallel: ParallelLayout = field(default_factory=ParallelLayout)
    loss: LossConfig = field(default_factory=LossConfig)
    intermediate: IntermediateConfig = field(default_factory=IntermediateConfig)
    teacher_correction: CorrectionConfig = field(default_factory=CorrectionConfig)

    @property
    def taught(self) -> bool:
        """Whether anything is learnt from the teacher."""
        return self.loss.label_weight < 1 or bool(self.intermediate.weights())

    @property
    def validated(self) -> tuple[str, ...]:
        """The divergence, if there is a teacher, and the loss of the labels."""
        return ("kl", "lm_loss") if self.taught else ("lm_loss",)

    @property
    def processes(self) -> int:
        """With those of a teacher on ranks of its own."""
        apart = self.taught and self.teacher_placement == "own_ranks"
        return self.parallel.world_size + (self.teacher_parallel.world_size if apart else 0)

    def inputs(self) -> dict[str, str]:
        """The teacher, or its cache, counts only where it is read."""
        found = super().inputs()
        return found if self.taught else {name: path for name, path in found.items() if not name.startswith("teacher")}

    def faults(self) -> list[str]:
        """Those of every training, a teacher that is lacking, and one that cannot be where it is put."""
        found = [*super().faults(), *choice(self, "teacher_placement", TEACHER_PLACEMENTS)]
        if self.teacher is None and self.teacher_cache is None and self.taught:
            found.append(
                "teacher=null: there is something to learn from it; name a checkpoint or a teacher_cache, or train on "
                "the labels alone with loss.label_weight=1 and no intermediate losses"
            )
        found += self._context_faults()
        if self.recompute == "full" and self.intermediate.weights():
            found.append(
                "recompute=full: intermediate losses are taken inside the layers, which would run twice; use "
                "selective, or no intermediate losses"
            )
        return found + self._placement_faults()

    def _context_faults(self) -> list[str]:
        if self.parallel.context == 1 or self.teacher_placement == "shared":
            return []
        return [
            f"parallel.context={self.parallel.context}: sequences are shared out over the student's ranks, so the "
            "teacher must be there too; set teacher_placement=shared, or use a teacher_cache"
        ]

    def _placement_faults(self) -> list[str]:
        own, placement, found = self.teacher_parallel, self.teacher_placement, []
        where = f"teacher_placement={placement}"
        if self.teacher_cache is not None:
            where = f"teacher_cache={self.teacher_cache}"
            if placement != "shared" or own != ParallelLayout():
                found.append(f"{where}: is read by the student's ranks; leave out teacher_placement, teacher_parallel")
        elif placement == "shared" and own != ParallelLayout():
            found.append(f"{where}: has the student's layout; leave out teacher_parallel, or give the teacher its own")
        elif placement != "shared":
            if own.virtual_pipeline is not None:
                found.append(
                    f"teacher_parallel.virtual_pipeline={own.virtual_pipeline}: a teacher only runs forward, where "
                    "virtual stages gain nothing; set it to null"
                )
            if placement == "own_layout" and own.world_size != self.parallel.world_size:
                found.append(
                    f"{where}: teacher_parallel makes {own.world_size} ranks of the {self.parallel.world_size} that "
                    "parallel makes; they must be as many"
                )
            length = self.data.sequence_length
            found += [fault.replace("parallel.", "teacher_parallel.") for fault in own.sequence_faults(length)]
        if self.teacher_correction.lr is not None and (
            not self.taught or self.teacher_cache is not None or placement != "shared"
        ):
            where_not = where if self.taught else "loss.label_weight=1"
            found.append(
                f"{where_not}: teacher_correction trains a teacher in the student's ranks and layout; use "
                "teacher_placement=shared without a cache and something to learn, or teacher_correction.lr=null"
            )
        if self.intermediate.weights() and (self.teacher_cache is not None or placement != "shared"):
            found.append(
                f"{where}: intermediate losses need the teacher's states in the student's ranks and layout; use "
                "teacher_placement=shared without a cache, or no intermediate losses"
            )
        return found
