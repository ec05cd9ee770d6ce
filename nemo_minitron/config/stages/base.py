"""What every stage has."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from operator import attrgetter
from typing import ClassVar

from omegaconf import MISSING

from nemo_minitron.config.parts import ParallelLayout, RuntimeConfig


@dataclass
class StageConfig:
    """What every stage has.

    Attributes:
        name: how records and reports call this run of the stage; empty takes the stage's own name.
        output: directory (or ``.nemo`` file) that the stage writes.
        overwrite: replace an output that is already there.
        runtime: device, seed and limits of the stage's processes.
    """

    STAGE: ClassVar[str] = ""
    #: Fields that name something another stage may have written.
    INPUTS: ClassVar[tuple[str, ...]] = ()
    #: Further fields that are paths.
    PATHS: ClassVar[tuple[str, ...]] = ("output",)
    #: The stage computes on a GPU where there is one. Others are given none on a cluster.
    NEEDS_GPU: ClassVar[bool] = True
    #: Layouts that may have context parallelism, by field.
    CONTEXT_PARALLEL: ClassVar[tuple[str, ...]] = ()
    #: The output holds the outputs of stages of their own, each with its record.
    LEADS: ClassVar[bool] = False
    #: Each run is made anew: an output of the same settings and inputs is not what this one would be.
    REPEATS: ClassVar[bool] = False
    #: Of a training, the settings (``parallel`` for all below it) that one may change and still go on with what was
    #: begun. None: the stage itself finds out what of its output it can go on with, or does not go on at all.
    GOES_ON_WITH: ClassVar[tuple[str, ...] | None] = None

    name: str = ""
    output: str = MISSING
    overwrite: bool = False
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    @property
    def layout(self) -> ParallelLayout:
        """The processes that the stage runs in; one, unless the stage has a ``parallel`` field."""
        return getattr(self, "parallel", None) or ParallelLayout()

    @property
    def processes(self) -> int:
        """How many are started."""
        return self.layout.world_size

    @property
    def started(self) -> int:
        """Processes that run at once, those included that the stage starts itself."""
        return self.processes

    @property
    def needs_gpu(self) -> bool:
        """Whether the stage has work for a GPU: ``runtime.device``, where it insists, else the stage's kind."""
        return self.NEEDS_GPU if self.runtime.device == "auto" else self.runtime.device == "cuda"

    def is_path(self, name: str, value: str) -> bool:
        """Whether a value of one of the fields that are paths is one, and not a word that the field also takes."""
        return True

    def inputs(self) -> dict[str, str]:
        """Paths that the stage reads, by field (``models.teacher`` for a mapping's entry), fields left null absent."""
        found: dict[str, str] = {}
        for name in self.INPUTS:
            value = attrgetter(name)(self)
            if isinstance(value, dict):
                found.update({f"{name}.{key}": path for key, path in value.items()})
            elif value is not None:
                found[name] = value
        return found

    def context_faults(self) -> list[str]:
        """Layouts with context parallelism, where nothing makes use of it."""
        layouts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return [
            f"{name}.context={layout.context}: only the trainings distill and correct share sequences out, by "
            "parallel.context; set it to 1"
            for name, layout in layouts.items()
            if isinstance(layout, ParallelLayout) and layout.context > 1 and name not in self.CONTEXT_PARALLEL
        ]

    def faults(self) -> list[str]:
        """What the stage's own fields show to be wrong."""
        return []
