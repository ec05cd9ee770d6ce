"""Stages that evaluate models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from omegaconf import MISSING

from nemo_minitron.config.parts import DataConfig, HarnessConfig, ParallelLayout, memory_faults, positive
from nemo_minitron.config.stages.base import NEEDS_MODEL, NEEDS_TORCH, StageConfig

__all__ = ["EvaluateConfig", "ReportConfig"]


@dataclass
class EvaluateConfig(StageConfig):
    """Held-out loss and sample generations of several models on the same tokens.

    Attributes:
        models: path of each model by the name that the report shows.
        baseline: name of the model that the others are compared with; null takes the first.
        data: text whose held-out split is used.
        tokens: held-out tokens to score, rounded down to whole blocks.
        micro_batch_size: blocks of one forward pass.
        prompts: each is answered by every model, greedily, through the chat template where there is one.
        max_new_tokens: longest answer.
        harness: benchmarks of lm-evaluation-harness.
        parallel: layout of each model.
        memory: "live" has a whole model in memory; "streamed" runs all samples through one layer after the other, with
            one layer's weights in memory (:mod:`nemo_minitron.streamed`); "auto" streams a model that does not fit,
            where neither prompts nor benchmarks are asked for.
        states_memory: hidden states that each process keeps in memory while it streams, such as "8GiB"; more go to a
            file beside the output.
    """

    STAGE: ClassVar[str] = "evaluate"
    HELP: ClassVar[str] = "Held-out loss and sample answers of several models."
    NEEDS: ClassVar[tuple[str, ...]] = NEEDS_MODEL
    INPUTS: ClassVar[tuple[str, ...]] = ("models", "harness.include_path")
    ADDED: ClassVar[tuple[str, ...]] = ("memory", "states_memory")

    models: dict[str, str] = field(default_factory=dict)
    baseline: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    tokens: int = 65536
    micro_batch_size: int = 1
    prompts: list[str] = field(default_factory=list)
    max_new_tokens: int = 48
    harness: HarnessConfig = field(default_factory=HarnessConfig)
    parallel: ParallelLayout = field(default_factory=ParallelLayout)
    memory: str = "auto"
    states_memory: str = "8GiB"

    def faults(self) -> list[str]:
        """No models, an unknown baseline, less than one block."""
        faults = positive(self, "tokens", "micro_batch_size", "max_new_tokens")
        faults += memory_faults(self)
        if self.memory == "streamed" and (self.prompts or self.harness.tasks):
            what = "prompts" if self.prompts else "harness.tasks"
            faults.append(f"memory=streamed: {what} need the whole model, to generate; leave them out, or memory=live")
        if not self.models:
            faults.append("models: none is given; map at least one name to a path")
        if self.baseline is not None and self.baseline not in self.models:
            faults.append(f"baseline={self.baseline}: is none of the models ({', '.join(self.models)})")
        if 0 < self.tokens < self.data.sequence_length:
            faults.append(
                f"tokens={self.tokens}: less than one block of data.sequence_length={self.data.sequence_length}"
            )
        return faults


@dataclass
class ReportConfig(StageConfig):
    """Write ``index.html`` and ``report.md`` from the records that a run directory holds.

    Attributes:
        run: directory with the stages' outputs.
        others: further runs, which are compared side by side.
        output: where to write; ``run`` + "/report" unless given.
        overwrite: on, since a report can always be made again from the records.
        title: heading of the report and the model card; empty says what was made of which model.
        base_model: name of the teacher on the Hugging Face Hub, for the model card; null takes what is known of its
            source.
        license: the Hub's name of the model's license, such as "apache-2.0", for the model card; null takes what the
            teacher's own card, or its package, says.
        price_per_gpu_hour: price of one GPU for an hour, in ``currency``; null leaves prices out.
        currency: what prices are in, such as "USD".
    """

    STAGE: ClassVar[str] = "report"
    HELP: ClassVar[str] = "Write index.html and report.md of a run."
    NEEDS: ClassVar[tuple[str, ...]] = (*NEEDS_TORCH, "matplotlib")
    LEVEL: ClassVar[str] = "torch"
    INPUTS: ClassVar[tuple[str, ...]] = ("run",)
    PATHS: ClassVar[tuple[str, ...]] = ("output", "others")
    ADDED: ClassVar[tuple[str, ...]] = ("price_per_gpu_hour", "currency")
    NEEDS_GPU: ClassVar[bool] = False

    run: str = MISSING
    others: list[str] = field(default_factory=list)
    output: str = "${run}/report"
    overwrite: bool = True
    title: str = ""
    base_model: str | None = None
    license: str | None = None
    price_per_gpu_hour: float | None = None
    currency: str = ""

    def faults(self) -> list[str]:
        """A price that is none."""
        return positive(self, "price_per_gpu_hour")
