"""Stages that train on text: a student with its teacher, and a model by itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from omegaconf import MISSING

from nemo_minitron.config.parts import (
    QUANTIZED_TRAININGS,
    TEACHER_PLACEMENTS,
    CorrectionConfig,
    DataConfig,
    IntermediateConfig,
    LossConfig,
    OnPolicyConfig,
    ParallelLayout,
    Schedule,
    TeacherConfig,
    batch_faults,
    choice,
    group_size_faults,
    teacher_shares,
)
from nemo_minitron.config.stages.base import NEEDS_TRAINING, StageConfig

__all__ = ["CorrectConfig", "DistillConfig", "TrainingConfig"]


@dataclass
class TrainingConfig(Schedule, StageConfig):
    """The settings of every training on text.

    Attributes:
        data: training text; its held-out split validates.
        result: which checkpoint becomes the stage's model, "last" or "best".
        resume: go on from the last checkpoint in ``output``, under the same settings; layout, micro-batches, time limit
            and intervals may change.
        parallel: layout of the models.
    """

    NEEDS: ClassVar[tuple[str, ...]] = NEEDS_TRAINING
    LEVEL: ClassVar[str] = "nemo"
    MAKES_MODEL: ClassVar[bool] = True
    CONTEXT_PARALLEL: ClassVar[tuple[str, ...]] = ("parallel",)
    EXPERT_PARALLEL: ClassVar[tuple[str, ...]] = ("parallel",)
    RESUMABLE_CHANGES: ClassVar[tuple[str, ...] | None] = (
        "parallel", "micro_batch_size", "recompute", "logits", "max_minutes", "log_every", "save_every",
        "validate_every", "result", "data.workers", "teacher_placement", "teacher_parallel",
        "teachers.*.placement", "teachers.*.parallel",
    )  # fmt: skip

    data: DataConfig = field(default_factory=DataConfig)
    result: str = "last"
    resume: bool = True
    parallel: ParallelLayout = field(default_factory=ParallelLayout)

    @property
    def validated(self) -> tuple[str, ...]:
        """The measures of a validation."""
        return ("lm_loss",)

    @property
    def tokens(self) -> int:
        """Tokens that the whole training sees."""
        return self.steps * self.global_batch_size * self.data.sequence_length

    def faults(self) -> list[str]:
        """Ranges, a batch that does not divide, a schedule that does not fit."""
        faults = [
            *super().faults(),
            *choice(self, "keep_best", self.validated),
            *choice(self, "result", ("last", "best")),
            *(unfilled := batch_faults(self, self.parallel.data)),
        ]
        if self.result == "best" and self.keep_best is None:
            faults.append(f"result=best: none is kept; set keep_best to one of {', '.join(self.validated)}")
        one_pass = self.micro_batch_size * self.parallel.data
        if not unfilled and one_pass > 0 and self.parallel.virtual_pipeline and self.parallel.pipeline > 0:
            passes = self.global_batch_size // one_pass
            if passes % self.parallel.pipeline:
                faults.append(
                    f"global_batch_size={self.global_batch_size}: makes {passes} micro-batches a rank; virtual "
                    f"pipeline stages need a multiple of parallel.pipeline={self.parallel.pipeline}"
                )
        faults += self.parallel.sequence_faults(self.data.sequence_length)
        if self.parallel.context > 1 and self.data.documents == "mask":
            faults.append(
                f"parallel.context={self.parallel.context}: Transformer Engine's attention takes no masks of documents "
                "where sequences are shared out; set data.documents=join, or parallel.context=1"
            )
        return faults


@dataclass
class CorrectConfig(TrainingConfig):
    """Train a model on the text itself, by the language-model loss.

    Of a teacher before distillation this is teacher correction (arXiv 2408.11796, section 2): it learns the
    distribution of the data that it is going to teach on.

    Attributes:
        model: checkpoint to train.
    """

    STAGE: ClassVar[str] = "correct"
    HELP: ClassVar[str] = "Train a model on text by the language-model loss: a teacher before it teaches."
    DONE: ClassVar[str] = "corrected"
    INPUTS: ClassVar[tuple[str, ...]] = ("model",)

    model: str = MISSING


@dataclass
class DistillConfig(TrainingConfig):
    """Train a student on its teacher's logits (Minitron, arXiv 2407.14679, section 3).

    Attributes:
        student: checkpoint to train.
        teacher: checkpoint to learn from. It may be left out with a ``teacher_cache``, or if nothing is learnt from it
            (``loss.label_weight=1`` and no intermediate losses).
        teachers: several teachers in place of ``teacher``: the loss is the weighted sum of the divergences from all, or
            each teaches the blocks of its own sources.
        teacher_cache: output of ``minitron cache``, to read the logits from; if ``teacher`` is given too, it is only
            compared with the model that was cached.
        teacher_placement: "shared" (the student's ranks and layout), "own_layout" (the same ranks, laid out by
            ``teacher_parallel``) or "own_ranks" (``teacher_parallel`` further processes).
        teacher_parallel: layout of a teacher with "own_layout" or "own_ranks".
        loss: the loss of a token's logits.
        intermediate: losses of the states inside the models; none by default.
        teacher_correction: train the teacher on the labels meanwhile; off by default.
        quantize: train the student for this quantization, "fp8", "int4" or "nvfp4": its matrices are rounded in every
            forward pass, as an export of that name rounds them; null trains a float model.
        group_size: of "int4", the columns that share a scale; null takes 128.
        on_policy: train on answers that the student writes itself meanwhile; off by default.
    """

    STAGE: ClassVar[str] = "distill"
    HELP: ClassVar[str] = "Train a student on its teacher's logits."
    ROLE: ClassVar[str] = "distilled"
    DONE: ClassVar[str] = "distilled"
    INPUTS: ClassVar[tuple[str, ...]] = ("student", "teacher", "teachers", "teacher_cache", "on_policy.prompts.path")
    ADDED: ClassVar[tuple[str, ...]] = (*TrainingConfig.ADDED, "quantize", "group_size", "teachers", "on_policy")

    student: str = MISSING
    teacher: str | None = None
    teachers: list[TeacherConfig] = field(default_factory=list)
    teacher_cache: str | None = None
    teacher_placement: str = "shared"
    teacher_parallel: ParallelLayout = field(default_factory=ParallelLayout)
    loss: LossConfig = field(default_factory=LossConfig)
    intermediate: IntermediateConfig = field(default_factory=IntermediateConfig)
    teacher_correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    quantize: str | None = None
    group_size: int | None = None
    on_policy: OnPolicyConfig = field(default_factory=OnPolicyConfig)

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
        """Number of processes, with those of a teacher on ranks of its own."""
        apart = self.taught and self.teacher_placement == "own_ranks"
        return self.parallel.world_size + (self.teacher_parallel.world_size if apart else 0)

    def inputs(self) -> dict[str, str]:
        """The teacher, or its cache, counts only where it is read, and prompts where the student answers them."""
        inputs = super().inputs()
        if not self.on_policy.share:
            inputs.pop("on_policy.prompts.path", None)
        return (
            inputs if self.taught else {name: path for name, path in inputs.items() if not name.startswith("teacher")}
        )

    def faults(self) -> list[str]:
        """The faults of every training, a missing teacher, and a placement that the teacher cannot have."""
        faults = [*super().faults(), *choice(self, "teacher_placement", TEACHER_PLACEMENTS)]
        faults += choice(self, "quantize", QUANTIZED_TRAININGS)
        faults += group_size_faults(self.group_size, [self.quantize] if self.quantize else [])
        if self.teachers:
            faults += self._several_faults()
        elif self.teacher is None and self.teacher_cache is None and self.taught:
            faults.append(
                "teacher: none is given; name a checkpoint or a teacher_cache, or train on the labels alone with "
                "loss.label_weight=1 and no intermediate losses"
            )
        if not self.teachers:
            faults += self._context_faults() + self._expert_faults()
        if self.recompute == "full" and self.intermediate.weights():
            faults.append(
                "recompute=full: intermediate losses are taken inside the layers, which would run twice; use "
                "selective, or no intermediate losses"
            )
        return faults + self._placement_faults() + self._on_policy_faults()

    def _on_policy_faults(self) -> list[str]:
        if not self.on_policy.share > 0:
            return []
        where = f"on_policy.share={self.on_policy.share}"
        with_ = {
            f"teacher_cache={self.teacher_cache}": (
                self.teacher_cache is not None,
                "a cache does not know the answers that the student is going to write; name the teacher alone",
            ),
            f"loss.label_weight={self.loss.label_weight}": (
                self.loss.label_weight > 0,
                "the labels of its answers are the student's own words; set it to 0",
            ),
            f"teacher_correction.lr={self.teacher_correction.lr}": (
                self.teacher_correction.lr is not None,
                "the teacher would be trained on the student's words; correct it before, with `minitron correct`",
            ),
            "intermediate": (bool(self.intermediate.weights()), "is not offered together; use no intermediate losses"),
            f"quantize={self.quantize}": (self.quantize is not None, "is not offered together; leave one of them out"),
            "teachers": (bool(self.teachers), "is not offered together; name a single teacher"),
            f"logits={self.logits}": (
                self.logits != "whole" and self.on_policy.reweighted,
                "the weights of stale answers are of whole logits; set logits=whole, or raise on_policy.max_age",
            ),
            f"parallel.context={self.parallel.context}": (
                self.parallel.context > 1,
                "answers are not generated with sequences that are shared out; set it to 1",
            ),
            f"parallel.expert={self.parallel.expert}": (
                self.parallel.expert > 1,
                "answers are not generated with experts that are shared out; set it to 1",
            ),
        }
        return [f"{where}: with {what}: {why}" for what, (there, why) in with_.items() if there]

    def teacher_shares(self) -> dict[str, dict[str, float]]:
        """The share of each of several teachers in the loss of the blocks of each source, by their names."""
        return teacher_shares(self.teachers, [source.name for source in self.data.all_sources()])[0]

    def _several_faults(self) -> list[str]:
        """Settings that go with a single teacher alone, shares that do not come out, layouts that do not fit."""
        faults = []
        if self.teacher is not None:
            faults.append("teacher: teachers are given too; leave out one of the two")
        single = {
            f"teacher_cache={self.teacher_cache}": self.teacher_cache is not None,
            f"teacher_placement={self.teacher_placement}": self.teacher_placement != "shared",
            "teacher_parallel": self.teacher_parallel != ParallelLayout(),
            f"teacher_correction.lr={self.teacher_correction.lr}": self.teacher_correction.lr is not None,
            "intermediate": bool(self.intermediate.weights()),
            f"logits={self.logits}": self.logits != "whole",
        }
        faults += [
            f"{what}: is of a single teacher; leave it out, or give one teacher in place of teachers"
            for what, given in single.items()
            if given
        ]
        if not self.data.faults():
            faults += teacher_shares(self.teachers, [source.name for source in self.data.all_sources()])[1]
        for number, teacher in enumerate(self.teachers):
            if teacher.placement != "own_layout":
                continue
            where, own = f"teachers[{number}]", teacher.parallel
            if own.world_size != self.parallel.world_size:
                faults.append(
                    f"{where}.placement=own_layout: its parallel makes {own.world_size} ranks of the "
                    f"{self.parallel.world_size} that parallel makes; they must be as many"
                )
            faults += [f"{where}.{fault}" for fault in own.sequence_faults(self.data.sequence_length)]
            faults += [
                f"{where}.placement=own_layout: is not offered with parallel.{name}={value}; use placement=shared"
                for name in ("context", "expert")
                if (value := getattr(self.parallel, name)) > 1
            ]
        return faults

    def _context_faults(self) -> list[str]:
        if self.parallel.context == 1 or self.teacher_placement == "shared":
            return []
        return [
            f"parallel.context={self.parallel.context}: sequences are shared out over the student's ranks, so the "
            "teacher must be there too; set teacher_placement=shared, or use a teacher_cache"
        ]

    def _expert_faults(self) -> list[str]:
        if self.parallel.expert == 1:
            return []
        needs = {
            f"teacher_placement={self.teacher_placement}": self.teacher_placement != "shared",
            f"teacher_correction.lr={self.teacher_correction.lr}": self.teacher_correction.lr is not None,
        }
        return [
            f"parallel.expert={self.parallel.expert}: is not offered with {what}; set it to 1, or use a frozen teacher "
            "in the student's layout"
            for what, there in needs.items()
            if there
        ]

    def _placement_faults(self) -> list[str]:
        if self.teachers:
            return []
        own, placement, faults = self.teacher_parallel, self.teacher_placement, []
        where = f"teacher_placement={placement}"
        if self.teacher_cache is not None:
            where = f"teacher_cache={self.teacher_cache}"
            if placement != "shared" or own != ParallelLayout():
                faults.append(f"{where}: is read by the student's ranks; leave out teacher_placement, teacher_parallel")
        elif placement == "shared" and own != ParallelLayout():
            faults.append(f"{where}: has the student's layout; leave out teacher_parallel, or give the teacher its own")
        elif placement != "shared":
            if own.virtual_pipeline is not None:
                faults.append(
                    f"teacher_parallel.virtual_pipeline={own.virtual_pipeline}: a teacher only runs forward, where "
                    "virtual stages gain nothing; set it to null"
                )
            if placement == "own_layout" and own.world_size != self.parallel.world_size:
                faults.append(
                    f"{where}: teacher_parallel makes {own.world_size} ranks of the {self.parallel.world_size} that "
                    "parallel makes; they must be as many"
                )
            length = self.data.sequence_length
            faults += [fault.replace("parallel.", "teacher_parallel.") for fault in own.sequence_faults(length)]
        if self.teacher_correction.lr is not None and (
            not self.taught or self.teacher_cache is not None or placement != "shared"
        ):
            where_not = where if self.taught else "loss.label_weight=1"
            faults.append(
                f"{where_not}: teacher_correction trains a teacher in the student's ranks and layout; use "
                "teacher_placement=shared without a cache and something to learn, or teacher_correction.lr=null"
            )
        if self.intermediate.weights() and (self.teacher_cache is not None or placement != "shared"):
            faults.append(
                f"{where}: intermediate losses need the teacher's states in the student's ranks and layout; use "
                "teacher_placement=shared without a cache, or no intermediate losses"
            )
        return faults
