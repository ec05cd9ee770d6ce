"""A search's table and its Pareto plot, from the content of its ``search.json``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nemo_minitron.report.draw import Figure, Theme, clean, draw_figure
from nemo_minitron.report.tables import count, size

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["pareto", "rows", "table"]

#: Of each cost: what it is, and its units with the size from which each is used, the largest first.
_SCALES: dict[str, tuple[str, list[tuple[float, str]]]] = {
    "parameters": ("parameters", [(1e9, "billions"), (1e6, "millions"), (1e3, "thousands"), (1.0, "")]),
    "active_parameters": (
        "parameters that a token uses",
        [(1e9, "billions"), (1e6, "millions"), (1e3, "thousands"), (1.0, "")],
    ),
    "memory": ("memory of the fullest rank", [(2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B")]),
    "prefill": ("prefill", [(1e-3, "ms")]),
    "decode": ("decoding step", [(1e-3, "ms")]),
}


def rows(search: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells, the best candidate first; columns without any value are left out."""
    columns: list[tuple[str, Any]] = [("candidate", lambda candidate: candidate["name"])]
    ranked = [
        candidate
        for candidate in search["candidates"]
        if candidate["loss"] is not None and candidate["state"] != "outside"
    ]
    before = {candidate["name"]: number for number, candidate in enumerate(sorted(ranked, key=_before(search)), 1)}
    columns += [("parameters", lambda candidate: count(candidate["parameters"]))]
    for key, heading, form in (
        ("active_parameters", "active", count),
        ("memory", "memory", size),
        ("prefill", "prefill", lambda value: f"{1e3 * value:.1f} ms"),
        ("prefill_ratio", "of unpruned", lambda value: f"{value:.2f}"),
        ("decode", "decode", lambda value: f"{1e3 * value:.2f} ms"),
        ("decode_ratio", "of unpruned", lambda value: f"{value:.2f}"),
        ("loss", "loss, untrained", lambda value: f"{value:.4f}"),
        ("distilled_loss", "loss, distilled", lambda value: f"{value:.4f}"),
        ("accuracy", "accuracy, untrained", lambda value: f"{value:.3f}"),
        ("distilled_accuracy", "accuracy, distilled", lambda value: f"{value:.3f}"),
    ):
        if any(candidate.get(key) is not None for candidate in search["candidates"]):
            columns.append(
                (
                    heading,
                    lambda candidate, key=key, form=form: "" if candidate.get(key) is None else form(candidate[key]),
                )
            )
    columns.append(
        (
            "rank before",
            lambda candidate: (
                str(before[candidate["name"]]) if candidate["name"] in before else candidate["outside"] or ""
            ),
        )
    )
    return [heading for heading, _ in columns], [
        [cell(candidate) for _, cell in columns] for candidate in search["candidates"]
    ]


def _before(search: dict[str, Any]) -> Callable[[dict[str, Any]], tuple[float, float]]:
    """Sort key of the order before the distillation: by what the search ranks by, losses in files of old."""
    by_task = search.get("rank_by") == "task"
    return lambda candidate: (-candidate["accuracy"] if by_task else 0.0, candidate["loss"])


def table(search: dict[str, Any]) -> str:
    """Markdown: the table, and notes about the search."""
    headings, body = rows(search)
    lines = [f"| {' | '.join(headings)} |", f"|{'|'.join([' --- '] + [' ---: '] * (len(headings) - 1))}|"]
    lines += [f"| {' | '.join(cells)} |" for cells in body]
    return "\n".join(["# Search", "", *notes(search), "", *lines, ""])


def notes(search: dict[str, Any]) -> list[str]:
    """One line each: how many shapes, the unpruned model, whether distillation changed the order."""
    notes = [
        f"{search['shapes']:,} shapes are within the budget; {len(search['candidates']):,} were measured"
        + (f", spread over all of them, and {search['left_out']:,} left out." if search["left_out"] else "."),
        f"Losses are nats per token over {search['tokens']:,} calibration tokens; the unpruned model's is "
        f"{search['unpruned']['loss']:.4f}.",
    ]
    if search.get("task") is not None:
        notes.append(
            f"Accuracies are shares of the questions of {search['task']}; the unpruned model's is "
            f"{search['unpruned']['accuracy']:.3f}. The candidates are in the order of "
            f"{'their accuracies' if search['rank_by'] == 'task' else 'their losses'}."
        )
    distilled = [candidate for candidate in search["candidates"] if candidate["distilled_loss"] is not None]
    if len(distilled) > 1:
        same = distilled == sorted(distilled, key=_before(search))
        notes.append(
            f"Distilling the {len(distilled)} best on {search['distill_tokens']:,} tokens each "
            f"{'kept' if same else 'changed'} their order (Kendall's tau {_tau(search['kendall_tau'])})."
        )
    return notes


def _scale(cost: str, candidates: list[dict[str, Any]]) -> tuple[float, str]:
    """The factor and the label of an axis: in the largest unit of which the largest value has at least one."""
    what, units = _SCALES[cost]
    largest = max(candidate[cost] for candidate in candidates)
    unit, word = next(((unit, word) for unit, word in units if largest >= unit), units[-1])
    return 1 / unit, f"{what}, {word}" if word else what


def _tau(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def pareto(search: dict[str, Any], name: str = "pareto") -> Figure | None:
    """Loss against each cost, untrained and distilled, with the Pareto fronts; None if no candidate is ranked."""
    ranked = [
        candidate
        for candidate in search["candidates"]
        if candidate["loss"] is not None and candidate["state"] != "outside"
    ]
    costs = [cost for cost in search["pareto"] if any(candidate.get(cost) is not None for candidate in ranked)]
    if not costs:
        return None
    stages = [("loss", "untrained", "pruned", "s"), ("distilled_loss", "distilled", "distilled", "D")]

    def draw(canvas: Canvas, theme: Theme) -> None:
        grid = canvas.subplots(-(-len(costs) // 2), min(2, len(costs)), squeeze=False).flatten()
        for axes in grid[len(costs) :]:
            axes.set_visible(False)
        for number, (cost, axes) in enumerate(zip(costs, grid, strict=False)):
            scale, label = _scale(cost, ranked)
            for loss, word, role, marker in stages:
                known = [candidate for candidate in ranked if candidate[loss] is not None]
                points = [(scale * candidate[cost], candidate[loss]) for candidate in known]
                if points:
                    axes.scatter(
                        *zip(*points, strict=True), color=theme.colour(role), marker=marker, s=26, label=word, zorder=3
                    )
                front = search["pareto"][cost].get(loss, [])
                line = [
                    (scale * candidate[cost], candidate[loss])
                    for name in front
                    for candidate in known
                    if candidate["name"] == name
                ]
                if len(line) > 1:
                    axes.plot(*zip(*line, strict=True), color=theme.colour(role), lw=1.2, zorder=2)
            axes.set_xlabel(label)
            axes.locator_params(axis="x", nbins=6)
            if number % 2 == 0:
                axes.set_ylabel("loss, nats per token")
            if number == 0:
                axes.legend(frameon=False, labelcolor=theme.ink)
            clean(axes, theme, grid="both")

    best = next(candidate for candidate in search["candidates"] if candidate["name"] == search["best"])
    after = "" if best["distilled_loss"] is None else f", {best['distilled_loss']:.3f} distilled"
    return draw_figure(
        name,
        draw,
        (4.2 * min(2, len(costs)), 2.9 * -(-len(costs) // 2)),
        alt=f"Loss of {len(ranked)} shapes against {', '.join(costs)}. "
        f"Best: {best['name']}, loss {best['loss']:.3f}{after}.",
        caption="Each mark is a shape. A line joins those that none other beats in both cost and loss.",
    )
