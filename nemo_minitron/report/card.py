"""A model card in the Hub's form, from the records of a run, or of a checkpoint alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import yaml

from nemo_minitron import axes
from nemo_minitron.checkpoints.model_record import package_versions
from nemo_minitron.config.hub import hub_name
from nemo_minitron.report import tables
from nemo_minitron.report.base import Base, base_of, steps_of
from nemo_minitron.report.collect import Model, Run, stage_of
from nemo_minitron.report.lineage import lineage_table
from nemo_minitron.report.tables import Table

if TYPE_CHECKING:
    from nemo_minitron.checkpoints import Checkpoint

__all__ = ["card_content", "export_content"]


def card_content(run: Run, title: str, *, base_model: str | None, license_name: str | None) -> dict[str, Any] | None:
    """The values for the template; None for a run that made no smaller model.

    Args:
        run: as :func:`~nemo_minitron.report.collect.collect` gives it.
        title: heading.
        base_model: the Hub's name of the teacher, for the front matter.
        license_name: the Hub's name of the license.
    """
    base = Base(base_model or "", base_model, license_name)
    return _run_content(run, title, base)


def export_content(
    model: Checkpoint, run: Run | None, *, base_model: str | None, license_name: str | None
) -> dict[str, Any]:
    """The values for the template, for a model that is exported.

    Args:
        model: the model.
        run: the stages that made it, from :func:`~nemo_minitron.report.ancestry.ancestry`; None if they are not known.
        base_model: the Hub's name of the model that it was made from.
        license_name: the Hub's name of that model's license; None takes what the base's own card, or its package, says.
    """
    base = base_of(model.lineage, model.path, hub_name=base_model, license_name=license_name)
    small = None if run is None else run.small
    if run is not None and small is not None:
        words = "pruned and distilled" if small.role == "distilled" else "pruned"
        content = _run_content(run, f"{base.name}, {words}", base)
        assert content is not None
        return content
    count = axes.parameter_count(model.family, model.shape)
    alone = Run(model.path, base.name, models=[Model("this model", "other", model.shape, count)])
    versions = [[name, version] for name, version in package_versions().items() if version]
    steps = [
        [step, hub_name(place) or place.rstrip("/").rpartition("/")[2]]
        for step, place in steps_of(model.lineage, model.path)
    ]
    return {
        "front": _front(base),
        "title": base.name,
        "base": base,
        "lead": f"A language model of {tables.count(count)} parameters.",
        "boxes": [],
        "shapes": tables.shape_table(alone),
        "training": [],
        "evaluations": [],
        "tokens": None,
        "lineage": Table("What was done, the last step first", ["step", "to"], steps),
        "versions": Table("Versions", ["package", "version"], versions),
    }


def _front(base: Base, **further: Any) -> str:
    """The card's front matter."""
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front |= {"license": base.license} if base.license else {}
    front |= {"base_model": base.hub_name} if base.hub_name else {}
    return yaml.safe_dump(front | further, sort_keys=False, allow_unicode=True)


def _run_content(run: Run, title: str, base: Base) -> dict[str, Any] | None:
    """The card of the model that a run made smaller; None if it made none."""
    small = run.small
    if small is None:
        return None
    teacher = run.teacher
    front: dict[str, Any] = {}
    front["tags"] = ["minitron", "pruned", *(["distilled"] if small.role == "distilled" else [])]
    if results := _results(run, small):
        front["model-index"] = [{"name": title, "results": results}]
    less = f", {1 - small.parameters / teacher.parameters:.0%} fewer than its teacher" if teacher else ""
    return {
        "front": _front(base, **front),
        "title": title,
        "base": base,
        "lead": f"A language model of {tables.count(small.parameters)} parameters{less}, made by pruning and training.",
        "boxes": tables.step_boxes(run),
        "shapes": tables.shape_table(run),
        "training": [_training(stage) for stage in run.stages if "steps" in stage.config],
        "evaluations": [{"table": tables.loss_table(run, evaluation)} for _, evaluation in run.evaluations],
        "tokens": f"{run.trained_tokens:,}",
        "lineage": lineage_table(run),
        "versions": tables.versions(run),
    }


def _training(stage: Any) -> str:
    config = stage.config
    keys = ("steps", "global_batch_size", "lr", "min_lr", "warmup_steps", "precision")
    settings = ", ".join(f"{key} {config[key]}" for key in keys if config.get(key) is not None)
    loss = config.get("loss")
    return f"{stage.name} ({stage.stage}): {settings}" + (f", loss {json.dumps(loss)}" if loss else "")


def _results(run: Run, small: Model) -> list[dict[str, Any]]:
    """Held-out loss in the Hub's ``model-index`` form."""
    results = []
    for _, evaluation in run.evaluations:
        for model in evaluation["models"].values():
            origin = stage_of(model["path"], run)
            if origin is not None and origin.name == small.name:
                metric = {
                    "type": "cross-entropy",
                    "value": round(model["loss"], 4),
                    "name": "held-out loss, nats a token",
                }
                sources = ", ".join(sorted(model["domains"]))
                results.append(
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"type": "text", "name": f"held-out text ({sources})"},
                        "metrics": [metric],
                    }
                )
    return results
