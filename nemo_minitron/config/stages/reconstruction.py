"""The stage that refits a pruned model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from omegaconf import MISSING

from nemo_minitron.config.parts import (
    METHODS,
    BlockConfig,
    DataConfig,
    ParallelLayout,
    SourceConfig,
    choice,
    not_negative,
    positive,
    states_faults,
    written_formats,
)
from nemo_minitron.config.stages.base import NEEDS_MODEL, StageConfig
from nemo_minitron.config.tables import Choices, WrittenFormats

__all__ = ["HELD_OUT", "ReconstructConfig"]

#: Every so many-th calibration sample is held out for the choice of the ridges.
HELD_OUT = 5


@dataclass
class ReconstructConfig(StageConfig):
    """Refit the matrices of a pruned model to its teacher by least squares, layer by layer, before any training.

    One layer of each model is in memory at a time. A run that is stopped goes on at the layer where it stood when the
    stage is started again.

    Attributes:
        model: output of ``prune``, before any training.
        teacher: the model that it was cut from.
        data: calibration text.
        samples: blocks of ``data.sequence_length`` tokens; every fifth is held out, to choose the ridges.
        method: "least_squares", without gradients, or "block", which goes on with gradient steps on each layer alone.
        block: those steps.
        held_out_samples: blocks of held-out text on which the losses of teacher, pruned and reconstructed model are
            measured, by source; 0 measures none.
        outside: sources of text of another kind, which calibration does not see: losses are measured on as many blocks
            of them too.
        micro_batch_size: blocks of one forward pass.
        states_memory: hidden states of a model that each process keeps in memory, such as "8GiB"; more of the teacher's
            go to a file beside the output.
        parallel: data-parallel processes, which share the samples.
        format: what to write
    """

    STAGE: ClassVar[str] = "reconstruct"
    HELP: ClassVar[str] = "Refit a pruned model to its teacher, layer by layer, before any training."
    NEEDS: ClassVar[tuple[str, ...]] = NEEDS_MODEL
    MAKES_MODEL: ClassVar[bool] = True
    ROLE: ClassVar[str] = "reconstructed"
    DONE: ClassVar[str] = "reconstructed"
    INPUTS: ClassVar[tuple[str, ...]] = ("model", "teacher")
    ADDED: ClassVar[tuple[str, ...]] = ("method", "block", "held_out_samples", "outside")

    model: str = MISSING
    teacher: str = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    samples: int = 64
    method: str = "least_squares"
    block: BlockConfig = field(default_factory=BlockConfig)
    held_out_samples: int = 16
    outside: list[SourceConfig] = field(default_factory=list)
    micro_batch_size: int = 1
    states_memory: str = "8GiB"
    parallel: ParallelLayout = field(default_factory=ParallelLayout)
    format: str = "nemo2"

    TABLES: ClassVar[dict[str, Choices]] = {"format": WrittenFormats()}

    def faults(self) -> list[str]:
        """Unknown formats, sizes that are none, too few samples to hold any out, layouts beyond data parallelism."""
        faults = [*choice(self, "format", written_formats()), *choice(self, "method", METHODS)]
        faults += [*positive(self, "samples", "micro_batch_size"), *not_negative(self, "held_out_samples")]
        faults += states_faults(self)
        if self.outside and not self.held_out_samples:
            faults.append("outside: nothing is measured with held_out_samples=0; set it above 0, or leave outside out")
        least = HELD_OUT * self.parallel.data
        if 0 < self.samples < least:
            faults.append(
                f"samples={self.samples}: every {HELD_OUT}th sample is held out, so {self.parallel.data} data-parallel "
                f"processes need at least {least}"
            )
        faults += [
            f"parallel.{name}={getattr(self.parallel, name)}: a layer at a time is in memory, and processes share the "
            "samples alone; set it to 1, and parallel.data to the number of processes"
            for name in ("tensor", "pipeline", "context")
            if getattr(self.parallel, name) > 1
        ]
        return faults
