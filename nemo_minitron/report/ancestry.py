"""The part of a run that led to one of its models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nemo_minitron.report.run import Run, StageRun, stage_of

__all__ = ["ancestry", "made_at"]


def made_at(run: Run, path: str | Path) -> StageRun | None:
    """The stage whose output holds ``path``, where the run is now."""
    place = Path(path).absolute()
    return next((stage for stage in run.stages if place.is_relative_to(stage.path.absolute())), None)


def ancestry(run: Run, last: StageRun) -> Run:
    """A run with the stages that made a model, and with the evaluations that measured it, or an export of it.

    Args:
        run: a whole run.
        last: the stage that made the model.
    """
    stages: list[StageRun] = []
    todo = [last]
    while todo:
        stage = todo.pop()
        if stage in stages:
            continue
        stages.append(stage)
        origins = [stage_of(path, run) for path in stage.parents.values()]
        todo += [origin for origin in origins if origin is not None]
    names = {stage.name for stage in stages}
    return dataclasses.replace(
        run,
        stages=[stage for stage in run.stages if stage in stages],
        models=[model for model in run.models if model.name in names],
        scores=[scores for scores in run.scores if scores.name in names],
        curves=[curve for curve in run.curves if curve.name in names],
        searches=[],
        evaluations=[(name, evaluation) for name, evaluation in run.evaluations if run.measured(last, evaluation)],
    )
