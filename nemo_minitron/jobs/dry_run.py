"""The plans of stages, for ``--dry-run`` and for the checks before a pipeline starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nemo_minitron.config import StageConfig
from nemo_minitron.config.paths import read_paths
from nemo_minitron.errors import DiskError, MinitronError
from nemo_minitron.jobs.expected import ExpectedModel, expecting
from nemo_minitron.jobs.modules import stage_module
from nemo_minitron.jobs.output import Output
from nemo_minitron.jobs.plans import PlannedPath, StagePlan
from nemo_minitron.jobs.space import check_space, file_systems, present_bytes, space_faults

__all__ = [
    "Planned",
    "check_pipeline_space",
    "check_stage_space",
    "depends_on",
    "pipeline_space_faults",
    "plan_faults",
    "planned",
    "work_of",
]


@dataclass(frozen=True)
class Planned:
    """A stage before it runs.

    Attributes:
        name: of the stage.
        config: of the stage.
        plan: None where it cannot be made.
        produced: paths that stages before it write.
        is_done: it was done before, and no stage before it that it reads from runs again.
        present: bytes of its output that are there and that it goes on from.
        faults: reasons why it would fail.
    """

    name: str
    config: StageConfig
    plan: StagePlan | None
    produced: frozenset[str]
    is_done: bool
    present: float
    faults: list[str]


def plan_faults(configs: Sequence[StageConfig]) -> list[tuple[str, str]]:
    """The faults of a pipeline before it starts, as ``(name of the stage, "name: fault")``."""
    return [(stage.name, f"{stage.name}: {fault}") for stage in planned(configs) for fault in stage.faults]


def planned(configs: Sequence[StageConfig], *, alone: bool = False) -> Iterator[Planned]:
    """The plans of stages in order; outputs of earlier stages count as existing, with the sizes that they will have.

    Args:
        configs: of the stages.
        alone: each stage would run by itself, and could not resume an output of other settings.
    """
    produced: set[str] = set()
    models: dict[str, ExpectedModel | None] = {}
    again: list[StageConfig] = []
    for config in configs:
        name, output = config.name or config.STAGE, Output(config)
        plan: StagePlan | None = None
        is_done, present = False, 0.0
        try:
            is_done = not any(depends_on(config, other) for other in again) and output.state()[0] == "done"
            with expecting(models):
                plan = stage_module(config.STAGE).plan(config)
            if alone:
                plan.faults += output.resume_faults()
            if output.resumable and not config.overwrite and output.state()[0] == "unfinished":
                present = present_bytes(output.path)
            faults = [*plan.missing_reads(produced), *plan.faults]
            # Of a model whose sizes the plan does not know, a finished output says them.
            models |= {path: model for path, model in plan.makes.items() if model is not None or not is_done}
        except MinitronError as error:
            faults = [str(error)]
        yield Planned(name, config, plan, frozenset(produced), is_done, present, faults)
        if not is_done:
            again.append(config)
        produced.update([config.output, *(item.path for item in (plan.writes if plan is not None else ()))])


def pipeline_space_faults(configs: Sequence[StageConfig]) -> list[str]:
    """Why the stages of a pipeline that are not done cannot fit on the disk: a line for each file system."""
    todo = [
        (stage.name, stage.plan, stage.present)
        for stage in planned(configs)
        if stage.plan is not None and not stage.is_done
    ]
    return space_faults(file_systems(todo))


def check_pipeline_space(configs: Sequence[StageConfig]) -> None:
    """Refuse a pipeline with :func:`pipeline_space_faults`, before it writes anything.

    Raises:
        DiskError: naming the file system, what is needed and what is free.
    """
    if faults := pipeline_space_faults(configs):
        raise DiskError("; ".join(faults))


def check_stage_space(output: Output) -> None:
    """Refuse a stage whose output cannot fit on the disk, before it writes anything.

    Raises:
        DiskError: naming the file system that is too small.
    """
    plan = _plan(output.config)
    if plan is None or not plan.disk:
        return
    resumes = output.resumable and not output.config.overwrite and output.path.exists()
    present = present_bytes(output.path) if resumes and output.record() is None else 0.0
    check_space([(f"output: {output.path}", plan, present)])


def work_of(config: StageConfig) -> dict[str, float]:
    """What a stage has done, for estimates of the time of a later one: ``flops`` and ``bytes``, as far as known."""
    plan = _plan(config)
    if plan is None:
        return {}
    written = sum(need.staying for need in plan.disk)
    return {name: value for name, value in (("flops", plan.flops or 0.0), ("bytes", written)) if value}


def _plan(config: StageConfig) -> StagePlan | None:
    """The plan of a stage whose inputs are there; None where it cannot be made, which the stage itself explains."""
    try:
        plan: StagePlan = stage_module(config.STAGE).plan(config)
    except MinitronError:
        return None
    return plan


def depends_on(config: StageConfig, other: StageConfig) -> bool:
    """Whether a stage reads an output of another."""
    return any(PlannedPath(path, "").comes_from({other.output}) for path in read_paths(config).values())
