"""Tables of a run's alignment stages, from the metrics in their records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nemo_minitron.report.run import Run
from nemo_minitron.report.tables import Table

__all__ = ["alignment_tables"]


def alignment_tables(run: Run) -> list[Table]:
    """A table for each kind of alignment stage that the run holds; records without these metrics are listed in
    :attr:`~nemo_minitron.report.collect.Run.remarks`.
    """
    tables = []
    for kind, (caption, headings, rows_of) in _KINDS.items():
        rows: list[list[str]] = []
        for stage in run.stages:
            if stage.stage != kind:
                continue
            try:
                rows += [[stage.name, *row] for row in rows_of(stage.record["metrics"])]
            except (KeyError, TypeError, ValueError, IndexError) as error:
                run.remarks.append(f"the metrics of {stage.name} are incomplete ({error!r}); left out")
        if rows:
            tables.append(Table(caption, ["stage", *headings], rows))
    return tables


def _sft(metrics: dict[str, Any]) -> list[list[str]]:
    before, after = metrics["first_validation_loss"], metrics["last_validation_loss"]
    return [[f"{metrics['samples']:,}", f"{metrics['steps']:,}", _number(before), _number(after)]]


def _dpo(metrics: dict[str, Any]) -> list[list[str]]:
    rows = []
    for number, statistics in enumerate(metrics["rounds"]):
        before, after = statistics["before"], statistics["after"]
        values = [f"{number + 1}", f"{metrics['pairs'][number]:,}", f"{metrics['held_out'][number]:,}"]
        values += [f"{result['accuracy']:.0%}" for result in (before, after)]
        rows.append([*values, *(f"{result['margin']:.3f}" for result in (before, after))])
    return rows


def _reward(metrics: dict[str, Any]) -> list[list[str]]:
    return [
        [name, _number(row["mse"]), _number(row["mse_of_mean"]), _number(row["correlation"])]
        for name, row in metrics["attributes"].items()
    ]


def _reinforce(metrics: dict[str, Any]) -> list[list[str]]:
    first, last = metrics["first"], metrics["last"]
    return [[f"{metrics['steps']:,}", *(_number(step["reward"]) for step in (first, last)), _number(metrics["kl"])]]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


_KINDS: dict[str, tuple[str, list[str], Callable[[dict[str, Any]], list[list[str]]]]] = {
    "sft": (
        "Fine-tuning on answers: loss of held-out answers, in nats per token",
        ["conversations", "steps", "before", "after"],
        _sft,
    ),
    "dpo": (
        "Preferences: share of held-out pairs whose chosen answer gained more than the rejected one, and by how much "
        "(difference of the implicit rewards)",
        ["round", "pairs", "held out", "accuracy before", "accuracy after", "margin before", "margin after"],
        _dpo,
    ),
    "reward": (
        "Attribute model: squared errors on held-out answers, and what predicting their mean would give",
        ["attribute", "error", "error of the mean", "correlation"],
        _reward,
    ),
    "reinforce": (
        "REINFORCE: mean reward of answers to held-out prompts",
        ["steps", "before", "after", "divergence"],
        _reinforce,
    ),
}
