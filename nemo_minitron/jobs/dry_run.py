"""The plans of stages, for ``--dry-run``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nemo_minitron.config import StageConfig
from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs.modules import stage_module
from nemo_minitron.jobs.output import Output
from nemo_minitron.jobs.plans import StagePlan

__all__ = ["plan_faults", "planned"]


def plan_faults(configs: Sequence[StageConfig]) -> list[tuple[str, str]]:
    """The faults of a pipeline before it starts, as ``(name of the stage, "name: fault")``."""
    return [(name, f"{name}: {fault}") for name, *_, faults in planned(configs) for fault in faults]


def planned(
    configs: Sequence[StageConfig], *, alone: bool = False
) -> Iterator[tuple[str, StageConfig, StagePlan | None, set[str], list[str]]]:
    """The plans of stages in order; outputs of earlier stages count as existing.

    Args:
        configs: of the stages.
        alone: each stage would run by itself, and could not resume an output of other settings.

    Yields:
        Of each stage its name, configuration and plan (None where it cannot be made), the paths that stages before it
        write, and its faults.
    """
    produced: set[str] = set()
    for config in configs:
        name = config.name or config.STAGE
        try:
            plan = stage_module(config.STAGE).plan(config)
            if alone:
                plan.faults += Output(config).resume_faults()
        except MinitronError as error:
            yield name, config, None, produced, [str(error)]
            produced.add(config.output)
            continue
        yield name, config, plan, produced, [*plan.missing_reads(produced), *plan.faults]
        produced.update([config.output, *(item.path for item in plan.writes)])
