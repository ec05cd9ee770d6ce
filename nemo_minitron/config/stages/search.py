"""The stage that searches for a shape."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

from omegaconf import MISSING

from nemo_minitron.config.parts import (
    BudgetConfig,
    DataConfig,
    DepthChoiceConfig,
    ParallelLayout,
    ShortDistillConfig,
    SpaceConfig,
    TargetConfig,
    TaskConfig,
    choice,
    not_negative,
    positive,
)
from nemo_minitron.config.stages.base import StageConfig, StageJob
from nemo_minitron.config.stages.distillation import DistillConfig
from nemo_minitron.config.stages.pruning import PruneConfig
from nemo_minitron.config.stages.reconstruction import ReconstructConfig
from nemo_minitron.config.tables import ESTIMATORS

__all__ = ["SearchConfig"]


@dataclass
class SearchConfig(StageConfig):
    """Search the shapes within a budget for the one that loses least (arXiv 2407.14679, section 4).

    All shapes are ranked by the loss of the pruned, untrained model; the best ones again after a short distillation. A
    run that is stopped goes on where it was, and no finished candidate is measured again.

    Attributes:
        model: checkpoint to prune.
        scores: output of ``score``.
        method, depth, depth_scores: how units and layers are chosen, as in ``prune``.
        space: which sizes are candidates.
        budget: what a shape may cost.
        student_layout: layout that every shape must fit, and whose memory counts.
        max_candidates: largest number of shapes to rank; if more fit, they are spread over all that fit.
        data: text; losses are of its calibration split, the distillation trains on its train split.
        samples: calibration blocks of ``data.sequence_length`` tokens for each loss.
        micro_batch_size: blocks of one forward pass.
        measure_latency: measure the latency of each candidate, even without a budget of latency.
        task: multiple-choice task, measured beside the loss.
        rank_by: "loss" or "task": what decides which candidates are distilled, and which is the best. Of equal
            accuracies the lower loss is first.
        reconstruct_samples: calibration blocks on which each candidate is refitted to the model, as by ``reconstruct``,
            before its loss is measured on others and before it is distilled; 0 leaves candidates as pruned.
        best: candidates that are distilled; 0 for none.
        distill: the short distillation.
        save_student: keep the best distilled student.
        resume: go on from the results in ``output``.
        parallel: layout of the models in ranking and distillation.
    """

    STAGE: ClassVar[str] = "search"
    HELP: ClassVar[str] = "Search the shapes within a budget for the one that loses least."
    INPUTS: ClassVar[tuple[str, ...]] = ("model", "scores", "depth_scores")
    ADDED: ClassVar[tuple[str, ...]] = ("task", "rank_by", "reconstruct_samples")
    JOBS: ClassVar[str] = "shared.search_jobs"

    model: str = MISSING
    scores: str = MISSING
    method: str = "activation"
    depth: DepthChoiceConfig = field(default_factory=DepthChoiceConfig)
    depth_scores: str | None = None
    space: SpaceConfig = field(default_factory=SpaceConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    student_layout: ParallelLayout = field(default_factory=ParallelLayout)
    max_candidates: int = 32
    data: DataConfig = field(default_factory=DataConfig)
    samples: int = 32
    micro_batch_size: int = 1
    measure_latency: bool = False
    task: TaskConfig = field(default_factory=TaskConfig)
    rank_by: str = "loss"
    reconstruct_samples: int = 0
    best: int = 3
    distill: ShortDistillConfig = field(default_factory=ShortDistillConfig)
    save_student: bool = False
    resume: bool = True
    parallel: ParallelLayout = field(default_factory=ParallelLayout)

    def inputs(self) -> dict[str, str]:
        """What the search reads of other stages, and the task if it is a file."""
        return {**super().inputs(), **({} if self.task.path is None else {"task": self.task.path})}

    @property
    def layout(self) -> ParallelLayout:
        """A single process, which starts the others when they are needed."""
        return ParallelLayout()

    @property
    def started(self) -> int:
        """Number of processes of each stage that it starts; the stages run one after the other."""
        return self.parallel.world_size

    @property
    def timed(self) -> bool:
        """Whether latency is measured."""
        return self.measure_latency or self.budget.latency_ms is not None

    def jobs(self) -> list[StageJob]:
        """The ranking, for each of the ``best`` candidates the stages that it goes through, and the end.

        Which candidate is the n-th, the ranking decides. Each is pruned, refitted if asked for, distilled and measured,
        beside the others. The end only reads and writes results.
        """
        ranks = self.parallel.world_size
        measuring = StageJob("ranking", self.STAGE, ranks, ranks, self.needs_gpu, begins=True, alone=True)
        jobs = [measuring]
        if self.budget.latency_ms is not None:
            jobs = [replace(measuring, name="latency"), replace(measuring, after=("latency",), begins=False)]
        last: list[str] = []
        for number in range(1, self.best + 1):
            stages: list[tuple[str, StageConfig]] = [("student", self.pruning("", TargetConfig()))]
            if self.reconstruct_samples:
                stages.append(("reconstructed", self.reconstruction("", "")))
            stages.append(("distilled", self.distillation("", "")))
            before = "ranking"
            for what, stage in stages:
                jobs.append(StageJob.of(stage, f"{number}.{what}", (before,)))
                before = jobs[-1].name
            last.append(f"{number}.measured")
            jobs.append(replace(measuring, name=last[-1], after=(before,), begins=False, alone=False))
        insists = self.runtime.device == "cuda"
        return [*jobs, StageJob("", self.STAGE, 1, 1, insists, tuple(last) or ("ranking",))]

    def pruning(self, output: str, target: TargetConfig) -> PruneConfig:
        """The stage that prunes to one of the shapes."""
        return PruneConfig(
            output=output, runtime=self.runtime, model=self.model, scores=self.scores, method=self.method,
            target=target, depth=self.depth, depth_scores=self.depth_scores,
        )  # fmt: skip

    def reconstruction(self, output: str, model: str) -> ReconstructConfig:
        """The stage that refits one of the pruned models."""
        return ReconstructConfig(
            output=output, runtime=self.runtime, model=model, teacher=self.model, data=self.data,
            samples=self.reconstruct_samples, micro_batch_size=self.micro_batch_size, parallel=self.parallel,
            held_out_samples=0,
        )  # fmt: skip

    def distillation(self, output: str, student: str) -> DistillConfig:
        """The stage that distils one of the students; it validates at its start and its end."""
        short = {field.name: getattr(self.distill, field.name) for field in fields(self.distill)}
        return DistillConfig(
            output=output, runtime=self.runtime, student=student, teacher=self.model, data=self.data,
            parallel=self.parallel, validate_every=self.distill.steps, validation_batches=1,
            save_every=max(1, min(100, self.distill.steps)), **short,
        )  # fmt: skip

    def faults(self) -> list[str]:
        """Nothing to rank, and what pruning and distilling would refuse."""
        faults = [
            *positive(self, "max_candidates", "samples", "micro_batch_size"),
            *not_negative(self, "best", "reconstruct_samples"),
            *choice(self, "rank_by", ("loss", "task")),
            *(unknown := choice(self, "method", ESTIMATORS)),
        ]
        if self.best > self.max_candidates > 0:
            faults.append(f"best={self.best}: lies above max_candidates={self.max_candidates}")
        if self.rank_by == "task" and self.task.given is None:
            faults.append("rank_by=task: there is no task; set task.path or task.builtin")
        if self.save_student and self.best == 0:
            faults.append("save_student=true: no student is distilled with best=0")
        some = TargetConfig(num_layers=1)
        faults += [fault for fault in self.pruning("", some).faults() if not unknown or not fault.startswith("method=")]
        if self.best:
            faults += [f"distill.{fault}" for fault in self.distillation("", "").faults()]
        if self.reconstruct_samples > 0:
            faults += [
                f"reconstruct_{fault}" if fault.startswith("samples=") else fault
                for fault in self.reconstruction("", "").faults()
                if fault.startswith(("samples=", "parallel."))
            ]
        if self.timed and self.parallel.world_size > 1:
            faults.append("measure_latency: candidates are timed in one process; set parallel to 1 x 1 x 1")
        return faults
