"""Stages that prune."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from omegaconf import MISSING

from nemo_minitron.config.parts import (
    AggregationConfig,
    DataConfig,
    DepthChoiceConfig,
    ParallelLayout,
    TargetConfig,
    TaylorConfig,
    VocabularyConfig,
    choice,
    positive,
    written_formats,
)
from nemo_minitron.config.stages.base import StageConfig, StageJob
from nemo_minitron.config.stages.importance import aggregation_faults, taylor_faults
from nemo_minitron.config.tables import ESTIMATORS, Choices, WrittenFormats

__all__ = ["IterateConfig", "PruneConfig", "RANDOM"]

RANDOM = "random"
"""The method that goes by no scores."""


@dataclass
class PruneConfig(StageConfig):
    """Remove the units that matter least.

    Attributes:
        model: checkpoint to prune.
        scores: output of ``score``. Not needed by the method "random", nor if only layers and tokens are removed and
            ``layers_to_drop`` or ``depth_scores`` give the layers.
        method: "random" draws the kept units (a baseline); the name of an estimator keeps its highest scores
        target: sizes of the pruned model, or the output of ``search``, whose best shape it gets.
        vocabulary: a smaller vocabulary; the tokenizer is trimmed, too.
        merge_pruned_heads: add the difference of kept and pruned heads to the kept heads (arXiv 2407.14679, section
            2.3).
        student_layout: layout that the pruned model will have; a target that it cannot split is refused.
        depth: how the layers to drop are chosen, by scores.
        depth_scores: output of ``depth``; needed by ``depth.criterion`` "loss" and "task".
        layers_to_drop: layers to remove whatever their scores (0-based); their number then fixes ``num_layers``.
        format: what to write
    """

    STAGE: ClassVar[str] = "prune"
    HELP: ClassVar[str] = "Remove the units that matter least, down to a target shape."
    LEVEL: ClassVar[str] = "nemo"
    MAKES_MODEL: ClassVar[bool] = True
    ROLE: ClassVar[str] = "pruned"
    DONE: ClassVar[str] = "pruned"
    INPUTS: ClassVar[tuple[str, ...]] = ("model", "scores", "depth_scores", "vocabulary.frequencies", "target.search")
    NEEDS_GPU: ClassVar[bool] = False

    model: str = MISSING
    scores: str | None = None
    method: str = "activation"
    target: TargetConfig = field(default_factory=TargetConfig)
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    merge_pruned_heads: bool = False
    student_layout: ParallelLayout = field(default_factory=ParallelLayout)
    depth: DepthChoiceConfig = field(default_factory=DepthChoiceConfig)
    depth_scores: str | None = None
    layers_to_drop: list[int] | None = None
    format: str = "nemo2"

    TABLES: ClassVar[dict[str, Choices]] = {"method": ESTIMATORS, "format": WrittenFormats()}

    def faults(self) -> list[str]:
        """Missing scores, nothing to prune, contradictory depths."""
        faults = [*choice(self, "method", ESTIMATORS, also=(RANDOM,)), *choice(self, "format", written_formats())]
        narrower = self.target.search is not None or self.target.given().keys() - {"num_layers"}
        named = self.layers_to_drop is not None or self.depth_scores is not None or not self.target.asked
        if self.method != "random" and self.scores is None and (narrower or not named):
            faults.append(f"scores: method={self.method} needs the directory that `minitron score` wrote")
        if not self.target.asked and not self.layers_to_drop and self.vocabulary.size is None:
            faults.append(
                "target: nothing is to be pruned; give at least one size of the target, the output of a search, "
                "layers_to_drop or vocabulary.size"
            )
        if self.merge_pruned_heads and (self.scores is None or self.method == "random"):
            faults.append(
                "merge_pruned_heads: needs scores, and a method that goes by them, to know which heads matter"
            )
        measured = self.depth.criterion in ("loss", "task")
        if measured and self.depth_scores is None:
            faults.append(
                f"depth_scores: criterion={self.depth.criterion} needs the directory that `minitron depth` wrote"
            )
        if self.depth_scores is not None and not measured:
            faults.append(
                "depth_scores: is read by depth.criterion=loss or task alone; set one of them or leave it null"
            )
        if self.depth != DepthChoiceConfig() and self.method == "random":
            faults.append("depth: method=random draws the layers; leave depth out")
        if self.depth != DepthChoiceConfig() and self.layers_to_drop is not None:
            faults.append("layers_to_drop: names the layers already; leave depth out")
        if self.layers_to_drop is not None:
            faults += [
                f"layers_to_drop: {n} is not a layer number (they count from 0)" for n in self.layers_to_drop if n < 0
            ]
            if len(set(self.layers_to_drop)) != len(self.layers_to_drop):
                faults.append(f"layers_to_drop={self.layers_to_drop}: a layer is named twice")
            if self.layers_to_drop and self.target.num_layers is not None:
                faults.append("layers_to_drop: already fixes the depth; leave target.num_layers null")
            if self.layers_to_drop and self.target.search is not None:
                faults.append("layers_to_drop: the search gives the number of layers; leave it null, or give sizes")
        return faults


@dataclass
class IterateConfig(StageConfig):
    """Prune in rounds, scoring the model before each: score, prune, score, prune.

    A run that is stopped goes on after its last finished round.

    Attributes:
        model: checkpoint to prune.
        target: sizes of the pruned model, or the output of ``search``, whose best shape it gets.
        rounds: number of rounds.
        spacing: how sizes change from round to round, "geometric" (equal ratios) or "linear" (equal steps).
        estimator: as in ``score``; one that runs the model.
        data, samples, micro_batch_size, aggregation, taylor, parallel: as in ``score``.
        format: what to write
    """

    STAGE: ClassVar[str] = "iterate"
    HELP: ClassVar[str] = "Prune in rounds: score, prune, score what is left, prune again."
    LEVEL: ClassVar[str] = "nemo"
    MAKES_MODEL: ClassVar[bool] = True
    ROLE: ClassVar[str] = "pruned"
    DONE: ClassVar[str] = "pruned"
    INPUTS: ClassVar[tuple[str, ...]] = ("model", "target.search")
    ADDED: ClassVar[tuple[str, ...]] = ("taylor",)
    TABLES: ClassVar[dict[str, Choices]] = {"format": WrittenFormats()}
    JOBS: ClassVar[str] = "shared.iterate_jobs"

    model: str = MISSING
    target: TargetConfig = field(default_factory=TargetConfig)
    rounds: int = 4
    spacing: str = "geometric"
    estimator: str = "activation"
    data: DataConfig = field(default_factory=DataConfig)
    samples: int = 1024
    micro_batch_size: int = 1
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    taylor: TaylorConfig = field(default_factory=TaylorConfig)
    format: str = "nemo2"
    parallel: ParallelLayout = field(default_factory=ParallelLayout)

    def jobs(self) -> list[StageJob]:
        """A job for each round; the last also writes the pruned model."""
        jobs: list[StageJob] = []
        for number in range(1, self.rounds):
            after = (jobs[-1].name,) if jobs else ()
            jobs.append(replace(StageJob.of(self, f"round-{number}", after), alone=True))
        return [*jobs, StageJob.of(self, after=(jobs[-1].name,) if jobs else ())]

    def faults(self) -> list[str]:
        """Nothing to prune, unknown choices."""
        faults = [
            *positive(self, "rounds", "samples", "micro_batch_size"),
            *choice(self, "spacing", ("geometric", "linear")),
            *choice(self, "estimator", ESTIMATORS),
            *choice(self, "format", written_formats()),
        ]
        if not self.target.asked:
            faults.append(
                "target: nothing is to be pruned; give at least one size of the target, or the output of a search"
            )
        if self.estimator in ESTIMATORS:
            estimator = ESTIMATORS[self.estimator]
            if not estimator.runs_model:
                faults.append(f"estimator={self.estimator}: goes by the weights; choose one that runs the model")
            faults += aggregation_faults(self.estimator, self.aggregation)
            faults += taylor_faults(self.estimator, self.taylor)
        return faults
