"""The sizes of a pruned model: those of the configuration, or of the best shape of a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_minitron.config import TargetConfig
from nemo_minitron.errors import CheckpointError
from nemo_minitron.jobs.plans import PlannedPath, StagePlan
from nemo_minitron.search.results import FILE_NAME, best_sizes

__all__ = ["plan_target", "target_lineage", "target_sizes"]


def target_sizes(target: TargetConfig) -> dict[str, int]:
    """The sizes that a model is pruned to, by the names of :class:`~nemo_minitron.shape.ModelShape`.

    Raises:
        CheckpointError: if they are those of a search whose result is not there, or cannot be read.
    """
    return target.given() if target.search is None else best_sizes(target.search)


def plan_target(plan: StagePlan, target: TargetConfig) -> dict[str, int] | None:
    """The sizes as far as they are known before anything runs; None if a search has yet to find them.

    The search's result is added to what the stage reads, a result that cannot be read to the faults.
    """
    if target.search is None:
        return target.given()
    result = PlannedPath(str(Path(target.search) / FILE_NAME), "shape of a search")
    plan.reads.append(result)
    if not result.exists():
        plan.notes.append(f"the sizes come from {target.search}: known when the search has run")
        return None
    try:
        sizes = best_sizes(target.search)
    except CheckpointError as error:
        plan.faults.append(f"target.search: {error}")
        return None
    plan.notes.append(f"the sizes are those of {target.search} as it is now")
    return sizes


def target_lineage(target: TargetConfig) -> dict[str, Any]:
    """Where the sizes come from, for ``minitron.json``; empty where the configuration names them."""
    return {} if target.search is None else {"search": target.search}
