"""A model card in the Hub's form, from the lineage of a checkpoint and the records of the run that made it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron import axes
from nemo_minitron.checkpoints.model_record import package_versions, read_model_record
from nemo_minitron.config.hub import hub_name
from nemo_minitron.report import tables
from nemo_minitron.report.ancestry import ancestry
from nemo_minitron.report.base import Base, base_of, steps_of
from nemo_minitron.report.benchmarks import benchmark_table, index_results
from nemo_minitron.report.history import Change, changes_of, first_parameters, joined, title_of
from nemo_minitron.report.lineage import lineage_table
from nemo_minitron.report.run import Model, Run, StageRun
from nemo_minitron.report.tables import Table
from nemo_minitron.shape import ModelShape

__all__ = ["card_content", "title_from"]

#: Tags of a card for what was done, where they are not the name of the stage.
_TAGS = {
    "prune": "pruned",
    "iterate": "pruned",
    "reconstruct": "reconstructed",
    "distill": "distilled",
    "correct": "corrected",
}


def card_content(
    shape: ModelShape,
    table: axes.Family,
    lineage: Mapping[str, Any],
    path: str | Path,
    *,
    run: Run | None = None,
    made: StageRun | None = None,
    title: str = "",
    base_model: str | None = None,
    license_name: str | None = None,
    library: str = "transformers",
) -> dict[str, Any]:
    """The values for the template: of one model, from all that made it, with its own losses.

    Args:
        shape, table: sizes and family of the model.
        lineage, path: of its checkpoint.
        run: the whole run that made it; None if it is not known.
        made: the stage of the run that made it; None if it is not known.
        title: heading; empty derives one from the lineage.
        base_model: the Hub's name of the model that it was made from.
        license_name: the Hub's name of that model's license; None takes what the base's own card, or its package, says.
        library: that the files are for, by the Hub's name.
    """
    base = base_of(lineage, path, hub_name=base_model, license_name=license_name)
    changes, after, before = changes_of(lineage), axes.parameter_count(table, shape), first_parameters(lineage, table)
    title = title or title_of(base.name, changes, before, after)
    known = Run(Path(path), base.name) if run is None or made is None else ancestry(run, made)
    measured = [
        (evaluation, name)
        for _, evaluation in known.evaluations
        for name in (run.measured(made, evaluation)[:1] if run is not None and made is not None else [])
    ]
    if known.models:
        shapes = tables.shape_table(known)
    else:
        shapes = tables.shape_table(Run(Path(path), base.name, models=[Model("this model", "other", shape, after)]))
    results = [result for evaluation, name in measured for result in index_results(name, evaluation)]
    return {
        "front": _front(base, changes, title, results, library),
        "library": library,
        "title": title,
        "base": base,
        "lead": _lead(changes, before, after),
        "pruned": any(change.stage in ("prune", "iterate") for change in changes),
        "distilled": any(change.stage == "distill" for change in changes),
        "boxes": tables.step_boxes(known),
        "shapes": shapes,
        "training": [_training(stage) for stage in known.stages if stage.kind.DONE and "steps" in stage.config],
        "evaluations": [
            {
                "name": name,
                "table": tables.loss_table(run or known, evaluation),
                "benchmarks": benchmark_table(known, evaluation),
            }
            for evaluation, name in measured
        ],
        "tokens": f"{known.trained_tokens:,}" if known.trained_tokens else None,
        "lineage": lineage_table(known) if known.stages else _steps(lineage, path),
        "versions": tables.versions(known) if known.stages else _versions(),
    }


def title_from(run: Run, base_model: str | None = None) -> str:
    """A title for a run: the model that it was for, what it was made from and how; the run's name without one.

    Args:
        run: a whole run.
        base_model: the Hub's name of the model that it was made from; None takes what an export, or the source, says.
    """
    result = run.result
    if result is not None and result.lineage and result.path is not None:
        changes = changes_of(result.lineage)
        before = run.teacher.parameters if run.teacher is not None else None
        if (record := read_model_record(result.path)) is not None:
            before = first_parameters(result.lineage, axes.family(record.architecture.family)) or before
        exports = [stage.config.get("base_model") for stage in reversed(run.stages) if stage.stage == "export"]
        hub_name = base_model or next((name for name in exports if isinstance(name, str)), None)
        name = base_of(result.lineage, result.path, hub_name=hub_name, license_name=None).name
        if name and changes:
            return title_of(name, changes, before, result.parameters)
    return run.name


def _lead(changes: list[Change], before: int | None, after: int) -> str:
    less = (
        ""
        if before is None or before <= after
        else f", {1 - after / before:.0%} fewer than the model that it was made from"
    )
    words = list(dict.fromkeys(change.words for change in changes))
    return f"A language model of {tables.count(after)} parameters{less}" + (f": {joined(words)}." if words else ".")


def _front(base: Base, changes: list[Change], title: str, results: list[dict[str, Any]], library: str) -> str:
    """The card's front matter."""
    front: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    front |= {
        key: value for key in ("license", "license_name", "license_link") if (value := getattr(base, key)) is not None
    }
    front |= {"base_model": base.hub_name} if base.hub_name else {}
    if changes:
        front["tags"] = list(
            dict.fromkeys(["minitron", *(_TAGS.get(change.stage, change.stage) for change in changes)])
        )
    if results:
        front["model-index"] = [{"name": title, "results": results}]
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True)


def _training(stage: StageRun) -> str:
    config = stage.config
    keys = ("steps", "global_batch_size", "lr", "min_lr", "warmup_steps", "precision")
    settings = ", ".join(f"{key} {config[key]}" for key in keys if config.get(key) is not None)
    loss = config.get("loss")
    return f"{stage.name} ({stage.stage}): {settings}" + (f", loss {json.dumps(loss)}" if loss else "")


def _steps(lineage: Mapping[str, Any], path: str | Path) -> Table:
    steps = [[step, hub_name(place) or place.rstrip("/").rpartition("/")[2]] for step, place in steps_of(lineage, path)]
    return Table("What was done, the last step first", ["step", "to"], steps)


def _versions() -> Table:
    versions = [[name, version] for name, version in package_versions().items() if version]
    return Table("Versions", ["package", "version"], versions)
