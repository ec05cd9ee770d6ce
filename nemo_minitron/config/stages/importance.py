"""Stages that measure a model for pruning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import MISSING

from nemo_minitron.config.parts import (
    AggregationConfig,
    DataConfig,
    ParallelLayout,
    TaskConfig,
    TaylorConfig,
    choice,
    memory_faults,
    not_negative,
    positive,
)
from nemo_minitron.config.stages.base import NEEDS_MODEL, NEEDS_TORCH, StageConfig
from nemo_minitron.config.tables import ESTIMATORS, Table

__all__ = ["DepthConfig", "ScoreConfig", "TokensConfig"]


def aggregation_faults(estimator: str, *given: AggregationConfig) -> list[str]:
    """Aggregations that an estimator of the table does not have."""
    entry, default = ESTIMATORS[estimator], AggregationConfig()
    faults = [entry.sequence_fault(aggregation.sequence) for aggregation in given]
    faults += [entry.batch_fault(aggregation.batch, default.batch) for aggregation in given]
    return list(dict.fromkeys(filter(None, faults)))


def taylor_faults(estimator: str, taylor: TaylorConfig) -> list[str]:
    """A loss where an estimator of the table has none."""
    if taylor == TaylorConfig() or ESTIMATORS[estimator].gradients:
        return []
    return [f"taylor.loss={taylor.loss}: estimator={estimator} goes by no loss; set estimator=taylor or leave it out"]


@dataclass
class ScoreConfig(StageConfig):
    """Score every unit of a model over calibration data (Minitron, arXiv 2407.14679, section 2.2).

    Attributes:
        model: checkpoint to score.
        estimator: what a unit's score is
        data: calibration text.
        samples: blocks of ``data.sequence_length`` tokens to run.
        micro_batch_size: blocks of one forward pass.
        aggregation: how activations become one score per unit.
        taylor: of the estimator "taylor".
        also: further aggregations, scored in the same pass; each becomes a score directory of its own inside the
            output, ``criteria/<sequence>-<batch>``.
        parallel: layout of the model.
        memory: "live" has the whole model in memory; "streamed" runs all samples through one layer after the other,
            with one layer's weights in memory (:mod:`nemo_minitron.streamed`); "auto" streams a model that does not
            fit.
        states_memory: hidden states that each process keeps in memory while it streams, such as "8GiB"; more go to a
            file beside the output.
    """

    EXPERT_PARALLEL: ClassVar[tuple[str, ...]] = ("parallel",)
    STAGE: ClassVar[str] = "score"
    HELP: ClassVar[str] = "Score every unit of a model by forward passes over calibration data."
    NEEDS: ClassVar[tuple[str, ...]] = NEEDS_MODEL
    INPUTS: ClassVar[tuple[str, ...]] = ("model",)
    ADDED: ClassVar[tuple[str, ...]] = ("taylor", "memory", "states_memory")

    model: str = MISSING
    estimator: str = "activation"
    data: DataConfig = field(default_factory=DataConfig)
    samples: int = 1024
    micro_batch_size: int = 1
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    taylor: TaylorConfig = field(default_factory=TaylorConfig)
    also: list[AggregationConfig] = field(default_factory=list)
    parallel: ParallelLayout = field(default_factory=ParallelLayout)
    memory: str = "auto"
    states_memory: str = "8GiB"

    TABLES: ClassVar[dict[str, Table[Any]]] = {"estimator": ESTIMATORS}

    @property
    def runs_model(self) -> bool:
        """Whether the estimator runs the model; else it reads the weights, in one process."""
        return self.estimator not in ESTIMATORS or ESTIMATORS[self.estimator].runs_model

    @property
    def layout(self) -> ParallelLayout:
        """Weights are read from the checkpoint, in one process."""
        return self.parallel if self.runs_model else ParallelLayout()

    @property
    def needs_gpu(self) -> bool:
        """Weights are read by the CPU."""
        return super().needs_gpu and (self.runs_model or self.runtime.device == "cuda")

    def criteria(self) -> list[tuple[str, str]]:
        """Pairs of aggregations over sequence and batch, that of ``aggregation`` first."""
        pair = ESTIMATORS[self.estimator].criterion
        return [pair(aggregation.sequence, aggregation.batch) for aggregation in (self.aggregation, *self.also)]

    def faults(self) -> list[str]:
        """Nothing to run, unknown estimators, aggregations that the estimator does not have."""
        faults = [*choice(self, "estimator", ESTIMATORS), *positive(self, "samples", "micro_batch_size")]
        faults += memory_faults(self)
        if self.estimator not in ESTIMATORS:
            return faults
        if self.memory == "streamed" and ESTIMATORS[self.estimator].gradients:
            faults.append(
                f"memory=streamed: the gradients of estimator={self.estimator} need the whole model; set memory=live, "
                "or estimator=activation"
            )
        faults += aggregation_faults(self.estimator, self.aggregation, *self.also)
        faults += taylor_faults(self.estimator, self.taylor)
        if self.also and (not self.runs_model or ESTIMATORS[self.estimator].batch is not None):
            faults.append(f"also: estimator={self.estimator} has nothing to aggregate; leave it out")
            return faults
        pairs = self.criteria()
        if len(set(pairs)) != len(pairs):
            faults.append("also: a pair of aggregations is given twice")
        return faults


@dataclass
class DepthConfig(StageConfig):
    """Measure a model without some of its layers: the loss, and the accuracy on a task (arXiv 2407.14679, 2408.11796).

    A run that is stopped goes on where it stood when the stage is started again.

    Attributes:
        model: checkpoint to measure.
        data: calibration text.
        samples: blocks of ``data.sequence_length`` tokens to run for each candidate.
        micro_batch_size: blocks of one forward pass.
        single: measure without each layer alone.
        block_lengths: measure without each run of so many neighbouring layers.
        greedy: drop up to so many layers one by one, measuring all others again after each; 0 for not at all.
        greedy_by: criterion of ``greedy``, "loss" or "task".
        task: multiple-choice task, measured besides the loss.
        reuse_prefix: keep the hidden states up to which the passes of two candidates are the same, which saves half of
            the layers' work and takes memory on the host.
        parallel: layout of the model.
        memory: "live" has the whole model in memory; "streamed" runs all candidates side by side through one layer
            after the other, with one layer's weights in memory (:mod:`nemo_minitron.streamed`); "auto" streams a model
            that does not fit.
        states_memory: hidden states of all candidates that each process keeps in memory while it streams, such as
            "8GiB"; more go to files beside the output.
    """

    STAGE: ClassVar[str] = "depth"
    HELP: ClassVar[str] = "Measure a model without some of its layers: loss and task score."
    NEEDS: ClassVar[tuple[str, ...]] = NEEDS_MODEL
    INPUTS: ClassVar[tuple[str, ...]] = ("model",)
    ADDED: ClassVar[tuple[str, ...]] = ("memory", "states_memory")

    model: str = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    samples: int = 128
    micro_batch_size: int = 1
    single: bool = True
    block_lengths: list[int] = field(default_factory=list)
    greedy: int = 0
    greedy_by: str = "loss"
    task: TaskConfig = field(default_factory=TaskConfig)
    reuse_prefix: bool = True
    parallel: ParallelLayout = field(default_factory=ParallelLayout)
    memory: str = "auto"
    states_memory: str = "8GiB"

    def inputs(self) -> dict[str, str]:
        """The model, and the task if it is a file."""
        return {**super().inputs(), **({} if self.task.path is None else {"task": self.task.path})}

    def faults(self) -> list[str]:
        """Nothing to measure, lengths below 1, a criterion without its task."""
        faults = [
            *positive(self, "samples", "micro_batch_size"),
            *not_negative(self, "greedy"),
            *choice(self, "greedy_by", ("loss", "task")),
            *memory_faults(self),
            *(f"block_lengths: {length} must be above 0" for length in self.block_lengths if length <= 0),
        ]
        if not self.single and not self.block_lengths and not self.greedy:
            faults.append("single: nothing is to be measured; set single=true, block_lengths or greedy")
        if self.greedy and self.greedy_by == "task" and self.task.given is None:
            faults.append("greedy_by=task: there is no task; set task.path or task.builtin")
        return faults


@dataclass
class TokensConfig(StageConfig):
    """Count the tokens of a text, for trimming a model's vocabulary.

    Attributes:
        model: checkpoint whose tokenizer is used.
        data: text whose tokens are counted.
        split: split of the text, "train", "calibration" or "held_out".
        blocks: blocks of ``data.sequence_length`` tokens to count; null counts the whole split.
    """

    STAGE: ClassVar[str] = "tokens"
    HELP: ClassVar[str] = "Count the tokens of a text, for trimming a model's vocabulary."
    NEEDS: ClassVar[tuple[str, ...]] = (*NEEDS_TORCH, "transformers")
    LEVEL: ClassVar[str] = "torch"
    INPUTS: ClassVar[tuple[str, ...]] = ("model",)
    NEEDS_GPU: ClassVar[bool] = False

    model: str = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    split: str = "train"
    blocks: int | None = None

    def faults(self) -> list[str]:
        """Unknown splits, nothing to count."""
        return [*choice(self, "split", ("train", "calibration", "held_out")), *positive(self, "blocks")]
