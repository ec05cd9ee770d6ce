"""The part of a run that led to one of its models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nemo_minitron.report.collect import Run, StageRun, stage_of

__all__ = ["ancestry"]


def ancestry(run: Run, path: str | Path) -> Run | None:
    """A run with the stages that made the model at ``path``, and with the evaluations that measured it.

    None if no stage of the run made it.
    """
    place = Path(path).absolute()
    last = next((stage for stage in run.stages if place.is_relative_to(stage.path.absolute())), None)
    if last is None:
        return None
    stages: list[StageRun] = []
    todo = [last]
    while todo:
        stage = todo.pop()
        if stage in stages:
            continue
        stages.append(stage)
        origins = [stage_of(parent["path"], run) for parent in (stage.record.get("parents") or {}).values()]
        todo += [origin for origin in origins if origin is not None]
    names = {stage.name for stage in stages}
    return dataclasses.replace(
        run,
        stages=[stage for stage in run.stages if stage in stages],
        models=[model for model in run.models if model.name in names],
        scores=[scores for scores in run.scores if scores.name in names],
        curves=[curve for curve in run.curves if curve.name in names],
        evaluations=[
            (name, evaluation)
            for name, evaluation in run.evaluations
            if any(stage_of(model["path"], run) == last for model in evaluation["models"].values())
        ],
    )
