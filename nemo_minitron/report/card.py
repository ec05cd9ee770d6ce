"""A model card in the Hub's form, from the records of a run."""

from __future__ import annotations

import json
from typing import Any

import yaml

from nemo_minitron.report import tables
from nemo_minitron.report.collect import Model, Run
from nemo_minitron.report.lineage import lineage_table

__all__ = ["card_content"]


def card_content(run: Run, title: str, *, base_model: str | None, license_name: str | None) -> dict[str, Any] | None:
    """The values for the template; None for a run that made no smaller model.

    Args:
        run: as :func:`~nemo_minitron.report.collect.collect` gives it.
        title: heading.
        base_model: the Hub's name of the teacher, for the front matter.
        license_name: the Hub's name of the license.
    """
    small = run.small
    if small is None:
        return None
    teacher = run.teacher
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front |= {"license": license_name} if license_name else {}
    front |= {"base_model": base_model} if base_model else {}
    front["tags"] = ["minitron", "pruned", *(["distilled"] if small.role == "distilled" else [])]
    if results := _results(run, small):
        front["model-index"] = [{"name": title, "results": results}]
    less = f", {1 - small.parameters / teacher.parameters:.0%} fewer than its teacher" if teacher else ""
    return {
        "front": yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        "title": title,
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
        for name, model in evaluation["models"].items():
            if run.roles.get(name) == small.role:
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
