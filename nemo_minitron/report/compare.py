"""Several runs side by side: sizes, losses, curves, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import DataError
from nemo_minitron.report.collect import Run, collect
from nemo_minitron.report.draw import Figure, Theme, clean, draw_figure
from nemo_minitron.report.tables import Table, count, duration, main_recovery

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["Comparison", "compare"]

#: Settings that say nothing about the result.
_ASIDE = ("output", "name", "overwrite", "resume", "run", "model", "student", "teacher", "scores", "models")


@dataclass(frozen=True)
class Comparison:
    """The content of the page.

    Attributes:
        labels: of the runs, all different.
        overview: one row per run.
        losses: held-out losses by model; None without an evaluation.
        settings: settings that differ, one row each; None if none do.
        figures: curves of the trainings.
    """

    runs: list[Run]
    labels: list[str]
    overview: Table
    losses: Table | None
    settings: Table | None
    figures: list[Figure]


def compare(directories: Sequence[str | Path]) -> Comparison:
    """Read the runs.

    Args:
        directories: of two runs or more.

    Raises:
        DataError: if a directory holds no finished stage, or is given twice.
    """
    paths = [Path(directory).resolve() for directory in directories]
    if len(set(paths)) < len(paths):
        raise DataError(f"a run is given twice ({', '.join(map(str, directories))}); give different ones to compare")
    runs = [collect(directory) for directory in directories]
    labels = _labels(paths)
    figures = [
        figure
        for key, title in (("lm_loss", "held-out language-model loss"), ("kl", "held-out divergence from the teacher"))
        if (figure := _curves(runs, labels, key, title)) is not None
    ]
    return Comparison(
        runs, labels, _overview(runs, labels), _losses(runs, labels), _settings(runs, labels), figures
    )  # fmt: skip


def _labels(paths: list[Path]) -> list[str]:
    """The shortest endings of the paths that are all different."""
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]


def _overview(runs: list[Run], labels: list[str]) -> Table:
    rows = []
    for label, run in zip(labels, runs, strict=True):
        small, teacher = run.result, run.teacher
        best = {name: value for _, evaluation in run.evaluations for name, value in evaluation["models"].items()}
        loss = next((best[name]["loss"] for name in best if run.roles.get(name) == "distilled"), None)
        won = main_recovery(run, [evaluation for _, evaluation in run.evaluations])
        tokens = run.trained_tokens
        rows.append(
            [
                label,
                count(teacher.parameters) if teacher else "–",
                count(small.parameters) if small else "–",
                f"{loss:.3f}" if loss is not None else "–",
                f"{won.share:.0%}" if won else "–",
                count(tokens) if tokens else "–",
                duration(sum(stage.seconds for stage in run.stages)),
            ]
        )
    headings = ["run", "teacher", "small model", "held-out loss", "gap recovered", "tokens trained", "time"]
    return Table("The runs", headings, rows, ["" for _ in rows])


def _losses(runs: list[Run], labels: list[str]) -> Table | None:
    """Held-out loss of each model of each run."""
    by_run = [
        {name: model for _, evaluation in run.evaluations for name, model in evaluation["models"].items()}
        for run in runs
    ]
    names = list(dict.fromkeys(name for models in by_run for name in models))
    if not names:
        return None
    rows = []
    for name in names:
        cells = []
        for models in by_run:
            error = models.get(name, {}).get("standard_error")
            loss = f"{models[name]['loss']:.3f}" if name in models else "–"
            cells.append(loss if error is None else f"{loss} ± {error:.3f}")
        rows.append([name, *cells])
    tokens = {evaluation["tokens"] for run in runs for _, evaluation in run.evaluations}
    same = "" if len(tokens) == 1 else "; the runs scored different numbers of tokens"
    caption = f"Held-out loss in nats per token, with its standard error{same}"
    roles = [next((run.roles[name] for run in runs if name in run.roles), "other") for name in names]
    return Table(caption, ["model", *labels], rows, roles)


def _settings(runs: list[Run], labels: list[str]) -> Table | None:
    """Settings of stages of one name that differ between the runs."""
    changed: list[dict[str, str]] = []
    for run in runs:
        flat: dict[str, str] = {}
        for stage in run.stages:
            flat |= {f"{stage.name}.{key}": str(value) for key, value in _leaves(stage.config)}
        changed.append(flat)
    there = [{stage.name for stage in run.stages} for run in runs]
    rows = []
    for key in dict.fromkeys(key for flat in changed for key in flat):
        values = [flat.get(key, "–") for flat in changed]
        if len(set(values)) > 1 and all(key.split(".")[0] in names for names in there):
            rows.append([key, *values])
    for name in dict.fromkeys(stage.name for run in runs for stage in run.stages):
        if any(name not in names for names in there):
            rows.append([name, *("there" if name in names else "–" for names in there)])
    return Table("Settings that differ", ["setting", *labels], rows, ["" for _ in rows]) if rows else None


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in entries:
        if not path and key in _ASIDE:
            continue
        here = f"{path}.{key}" if path else str(key)
        if isinstance(entry, dict | list) and entry:
            yield from _leaves(entry, here)
        elif key != "cache_dir":
            yield here, entry


def _curves(runs: list[Run], labels: list[str], key: str, title: str) -> Figure | None:
    """A validation metric of every training, over the tokens."""
    lines = []
    for label, run in zip(labels, runs, strict=True):
        for curve in run.curves:
            rows = [row for row in curve.validation if isinstance(row.get(key), int | float) and "tokens" in row]
            points = [(row["tokens"], row[key]) for row in rows]
            if points:
                lines.append((f"{label}: {curve.name}", points))
    if len(lines) < 2:
        return None

    def draw(canvas: Canvas, theme: Theme) -> None:
        import matplotlib as mpl

        axes = canvas.subplots()
        colours = mpl.colormaps["tab10" if len(lines) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
        for (name, points), colour in zip(lines, (*colours, *colours), strict=False):
            axes.plot(*zip(*points, strict=True), "o-", lw=1.6, ms=4, label=name, color=colour)
        axes.set_xlabel("tokens")
        axes.set_ylabel(f"{title}, nats per token")
        axes.legend(frameon=False, labelcolor=theme.ink)
        clean(axes, theme, grid="y")

    ends = "; ".join(f"{name} {points[-1][1]:.3f}" for name, points in lines)
    alt = f"Curves of {title}; last values: {ends}."
    return draw_figure(f"compare-{key}", draw, (7.0, 3.4), alt=alt, caption=f"{title}.".capitalize())
