"""The settings of every stage, and the table of all stages."""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, ClassVar

from omegaconf import MISSING

from nemo_minitron.config.parts import ParallelLayout, RuntimeConfig
from nemo_minitron.errors import ConfigError

__all__ = [
    "NEEDS_ALIGNMENT",
    "NEEDS_MODEL",
    "NEEDS_TORCH",
    "NEEDS_TRAINING",
    "STAGES",
    "StageConfig",
    "StageJob",
    "find_stage",
]

#: The configuration of each stage, by its name on the command line.
STAGES: dict[str, type[StageConfig]] = {}

#: What stages need of NVIDIA's stack and other packages (``NEEDS``).
NEEDS_TORCH = ("torch", "numpy")
NEEDS_MODEL = (*NEEDS_TORCH, "transformers", "megatron")
NEEDS_TRAINING = (*NEEDS_MODEL, "nemo", "lightning", "tensorboard")
NEEDS_ALIGNMENT = (*NEEDS_MODEL, "nemo 1", "lightning", "tensorboard", "hydra", "nemo_aligner")

#: Commands of ``minitron`` that are no stages, and words that stand where the name of one may.
_RESERVED = ("init", "chat", "run", "plan", "config", "status", "cancel", "verify", "pipeline", "slurm")


@dataclass(frozen=True)
class StageJob:
    """One of the jobs that a stage is on a cluster. Most stages are a single one.

    Attributes:
        name: within the stage, such as "ranking"; empty for the last, which writes the record of the stage.
        kind: stage whose time limit counts where neither the job nor the stage has one of its own.
        processes: number of processes that the cluster starts.
        started: number of processes that run at once, with those that they start themselves.
        needs_gpu: whether they have work for a GPU.
        after: names of the jobs of the stage that end well before it starts.
        begins: it is the first to write to the output: an old one is replaced, or put into the archive, before.
        alone: no other job of the stage runs beside it.
    """

    name: str
    kind: str
    processes: int
    started: int
    needs_gpu: bool
    after: tuple[str, ...] = ()
    begins: bool = False
    alone: bool = False

    @classmethod
    def of(cls, config: StageConfig, name: str = "", after: tuple[str, ...] = ()) -> StageJob:
        """A job that runs a whole stage."""
        return cls(name, config.STAGE, config.processes, config.started, config.needs_gpu, after)


@dataclass
class StageConfig:
    """The settings of every stage.

    Attributes:
        name: name of this run of the stage in records and reports; empty takes the stage's own name.
        output: directory (or ``.nemo`` file) that the stage writes.
        overwrite: replace an output that is already there.
        runtime: device, seed and limits of the stage's processes.
    """

    #: Name on the command line and in pipelines. A class that gives one is a stage; one without is a base of stages.
    STAGE: ClassVar[str] = ""
    #: What it does, in the list of commands; empty takes the first line of the docstring.
    HELP: ClassVar[str] = ""
    #: The module with its ``plan`` and ``run``; empty for ``nemo_minitron.stages.<name>``.
    MODULE: ClassVar[str] = ""
    #: What must be installed, keys of :data:`~nemo_minitron.runtime.requirements.PARTS`; checked before it starts.
    NEEDS: ClassVar[tuple[str, ...]] = NEEDS_TORCH
    #: What is imported before its processes are forked, a key of :data:`~nemo_minitron.jobs.warm.LEVELS`. A stage that
    #: needs more imports it itself.
    LEVEL: ClassVar[str] = "megatron"
    #: Reports look for a model in its output.
    MAKES_MODEL: ClassVar[bool] = False
    #: What that model is to a run, one of :data:`~nemo_minitron.report.collect.ROLES`.
    ROLE: ClassVar[str] = "other"
    #: What the stage does to the model that it starts from, as reports and model cards say it of the result ("pruned");
    #: empty where it makes no other model. ``{name}`` stands for a setting.
    DONE: ClassVar[str] = ""
    #: Fields that name something another stage may have written.
    INPUTS: ClassVar[tuple[str, ...]] = ()
    #: Further fields that are paths.
    PATHS: ClassVar[tuple[str, ...]] = ("output",)
    #: Settings that a later release added: at their defaults they are no part of an output's identity, so that outputs
    #: of earlier releases keep theirs. A group of settings may have the same.
    ADDED: ClassVar[tuple[str, ...]] = ()
    #: The stage computes on a GPU where there is one. Others are given none on a cluster.
    NEEDS_GPU: ClassVar[bool] = True
    #: Layouts that may have context parallelism, by field.
    CONTEXT_PARALLEL: ClassVar[tuple[str, ...]] = ()
    #: Layouts that may have expert parallelism, by field.
    EXPERT_PARALLEL: ClassVar[tuple[str, ...]] = ()
    #: The stage runs other stages; its output holds theirs, each with a record of its own.
    RUNS_CHILD_STAGES: ClassVar[bool] = False
    #: A module below ``nemo_minitron.stages`` that prepares the :meth:`jobs` of a stage that is several on a cluster
    #: (:mod:`nemo_minitron.jobs.stage_jobs`).
    JOBS: ClassVar[str] = ""
    #: Each run is made anew: the result does not follow from the settings and the inputs alone.
    REPEATS: ClassVar[bool] = False
    #: Settings that may differ when a run is resumed (``parallel`` stands for all settings below it, ``*`` for
    #: any entry of a list). None: the stage decides itself what it can resume, or cannot be resumed.
    RESUMABLE_CHANGES: ClassVar[tuple[str, ...] | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register a stage in :data:`STAGES`."""
        super().__init_subclass__(**kwargs)
        name = cls.__dict__.get("STAGE", "")
        if not name:
            return
        known = STAGES.get(name)
        if name in _RESERVED or (known is not None and _place(known) != _place(cls)):
            holder = "a word of the command line" if known is None else _place(known)
            raise ConfigError(f"{_place(cls)}: STAGE={name!r} is {holder} already; choose another name")
        STAGES[name] = cls

    name: str = ""
    output: str = MISSING
    overwrite: bool = False
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    @property
    def layout(self) -> ParallelLayout:
        """The layout of the stage's processes: its ``parallel`` field, or a single process."""
        return getattr(self, "parallel", None) or ParallelLayout()

    @property
    def processes(self) -> int:
        """Number of processes that are started."""
        return self.layout.world_size

    @property
    def started(self) -> int:
        """Number of processes that run at once, with those that the stage starts itself."""
        return self.processes

    @property
    def needs_gpu(self) -> bool:
        """Whether the stage has work for a GPU: by ``runtime.device``, or if that is "auto", by the kind of stage."""
        return self.NEEDS_GPU if self.runtime.device == "auto" else self.runtime.device == "cuda"

    def jobs(self) -> list[StageJob]:
        """The jobs of the stage on a cluster, in order; the last has no name, and writes the record."""
        return [StageJob.of(self)]

    def is_path(self, name: str, value: str) -> bool:
        """Whether a value of a path field is a path, and not a word that the field also takes."""
        return True

    def inputs(self) -> dict[str, str]:
        """Paths that the stage reads, by field (``models.teacher`` for an entry of a mapping, or of a list of named
        models), without null fields.
        """
        inputs: dict[str, str] = {}
        for name in self.INPUTS:
            value = attrgetter(name)(self)
            if isinstance(value, dict):
                inputs.update({f"{name}.{key}": path for key, path in value.items()})
            elif isinstance(value, list):
                inputs.update({f"{name}.{entry.name}": entry.model for entry in value})
            elif value is not None:
                inputs[name] = value
        return inputs

    def context_faults(self) -> list[str]:
        """Faults for layouts with context or expert parallelism that the stage does not use."""
        layouts = {
            field.name: layout
            for field in dataclasses.fields(self)
            if isinstance(layout := getattr(self, field.name), ParallelLayout)
        }
        return [
            f"{name}.context={layout.context}: only the trainings distill and correct share sequences out, by "
            "parallel.context; set it to 1"
            for name, layout in layouts.items()
            if layout.context > 1 and name not in self.CONTEXT_PARALLEL
        ] + [
            f"{name}.expert={layout.expert}: only score, distill and correct share experts out, by parallel.expert; "
            "set it to 1"
            for name, layout in layouts.items()
            if layout.expert > 1 and name not in self.EXPERT_PARALLEL
        ]

    def faults(self) -> list[str]:
        """What is wrong with the stage's own fields, one line each."""
        return []


def find_stage(name: str) -> type[StageConfig]:
    """The configuration of a stage.

    Args:
        name: key of :data:`STAGES`, or ``module:name`` for a stage that the import of a module registers there.

    Raises:
        ConfigError: if there is no such stage.
    """
    module, colon, name = name.rpartition(":")
    if colon and name not in STAGES:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise
            raise ConfigError(
                f"{name}: is a stage of {module}, which cannot be imported here; install it, or put it on PYTHONPATH"
            ) from error
    if name not in STAGES:
        raise ConfigError(f"{name}: is no stage; stages: {', '.join(STAGES)}")
    return STAGES[name]


def _place(cls: type[StageConfig]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
