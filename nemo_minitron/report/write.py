"""Write the report: one self-contained HTML file, and Markdown with its figures in ``plots/``."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.report import plots, score_plots, search, tables
from nemo_minitron.report.alignment import alignment_tables
from nemo_minitron.report.benchmarks import benchmark_table
from nemo_minitron.report.card import title_from
from nemo_minitron.report.collect import collect
from nemo_minitron.report.compare import Comparison, compare
from nemo_minitron.report.costs import cost_table
from nemo_minitron.report.diagram import shape_diagram
from nemo_minitron.report.draw import Figure
from nemo_minitron.report.export_cards import complete_cards, write_run_card
from nemo_minitron.report.lineage import lineage_table
from nemo_minitron.report.measures import measure_table, shortfall
from nemo_minitron.report.reconstruction import reconstructions
from nemo_minitron.report.run import Run
from nemo_minitron.report.serving import serving_notes, serving_plots, serving_tables
from nemo_minitron.report.template import rendered

__all__ = ["write_comparison", "write_report"]


def write_report(
    run_dir: str | Path,
    output: str | Path,
    *,
    title: str = "",
    base_model: str | None = None,
    license_name: str | None = None,
    price: float | None = None,
    currency: str = "",
) -> Run:
    """Write ``index.html``, ``report.md``, ``plots/*.png`` and, for a run that made a model, ``model-card.md``.

    The cards beside the run's exports are completed. Parts that the run does not have are left out; files that cannot
    be read are listed at the end of the report.

    Args:
        run_dir: directory with the stages' outputs.
        output: an existing directory.
        title: heading; empty says what was made of which model.
        base_model, license_name: for the front matter of the model card, as the Hub names them.
        price, currency: of a GPU-hour; None leaves prices out.

    Returns:
        The contents of the run.

    Raises:
        DataError: if ``run_dir`` holds no finished stage.
    """
    run, out = collect(run_dir), Path(output)
    names = {"title": title, "base_model": base_model, "license_name": license_name}
    write_run_card(run, out / "model-card.md", **names)  # type: ignore[arg-type]
    complete_cards(run, **names)  # type: ignore[arg-type]
    content = _content(run, title or title_from(run, base_model), price, currency)
    figures = [figure for section in content["figures"].values() for figure in section]
    (out / "index.html").write_text(rendered("index.html.j2", content), encoding="utf-8")
    (out / "report.md").write_text(rendered("report.md.j2", content, markdown=True), encoding="utf-8")
    _write_figures(figures, out)
    return run


def write_comparison(run_dirs: Sequence[str | Path], output: str | Path, *, title: str = "") -> Comparison:
    """Write ``index.html``, ``report.md`` and ``plots/*.png`` of several runs side by side.

    Args:
        run_dirs: directories with the stages' outputs, two or more.
        output: an existing directory.
        title: heading; empty takes the runs' names.

    Raises:
        DataError: if one of them holds no finished stage.
    """
    comparison = compare(run_dirs)
    content = {
        "title": title or " and ".join(comparison.labels),
        "written": _moment(datetime.datetime.now(datetime.UTC)),
        "found": comparison,
    }
    out = Path(output)
    (out / "index.html").write_text(rendered("compare.html.j2", content), encoding="utf-8")
    (out / "report.md").write_text(rendered("compare.md.j2", content, markdown=True), encoding="utf-8")
    _write_figures(comparison.figures, out)
    return comparison


def _write_figures(figures: Sequence[Figure], out: Path) -> None:
    if figures:
        (out / "plots").mkdir()
    for figure in figures:
        (out / "plots" / f"{figure.name}.png").write_bytes(figure.light)


def _content(run: Run, title: str, price: float | None, currency: str) -> dict[str, Any]:
    """Everything that the templates show."""
    evaluations = [_evaluation(run, name, evaluation) for name, evaluation in run.evaluations]
    searches = [shown for name, results in run.searches if (shown := _search(run, name, results)) is not None]
    servings = [_serving(run, name, content) for name, content in run.servings]
    score_figures = [
        figure
        for scores in run.scores
        for draw in (score_plots.neurons, score_plots.heads, score_plots.layers, score_plots.hidden)
        if (figure := draw(scores, run)) is not None
    ]
    training = [figure for curve in run.curves if (figure := plots.training(curve)) is not None]
    aligning = [figure for curve in run.alignments if (figure := plots.aligning(curve)) is not None]
    diagram, times = shape_diagram(run), plots.times(run)
    started = next((moment for stage in run.stages if (moment := _started(stage.record.get("started")))), None)
    return {
        "title": title,
        "run": run,
        "started": started,
        "written": _moment(datetime.datetime.now(datetime.UTC)),
        "cards": tables.cards(run),
        "boxes": tables.step_boxes(run),
        "shapes": tables.shape_table(run),
        "diagram": diagram,
        "measures": measure_table(run),
        "lineage": lineage_table(run),
        "searches": searches,
        "evaluations": evaluations,
        "servings": servings,
        "reconstructions": reconstructions(run),
        "alignment": alignment_tables(run),
        "figures": {
            "shapes": [] if diagram is None else [diagram],
            "searches": [shown["figure"] for shown in searches if shown["figure"] is not None],
            "losses": [evaluation["figure"] for evaluation in evaluations],
            "benchmarks": [evaluation["bars"] for evaluation in evaluations if evaluation["bars"] is not None],
            "servings": [figure for serving in servings for figure in serving["figures"]],
            "scores": score_figures,
            "training": training,
            "alignment": aligning,
            "times": [] if times is None else [times],
        },
        "times": times,
        "stages": tables.stage_table(run),
        "costs": cost_table(run, price=price, currency=currency),
        "exports": tables.export_table(run),
        "versions": tables.versions(run),
        "configs": [(stage.name, json.dumps(stage.config, indent=2, default=str)) for stage in run.stages],
        "roles": run.roles,
    }


def _evaluation(run: Run, name: str, evaluation: dict[str, Any]) -> dict[str, Any]:
    stage = next(stage for stage in run.stages if stage.name == name)
    only = len(run.evaluations) == 1
    return {
        "name": name,
        "table": tables.loss_table(run, evaluation),
        "shortfall": shortfall(stage.config.get("tokens"), evaluation),
        "recoveries": tables.recoveries(run, evaluation),
        "benchmarks": benchmark_table(run, evaluation),
        "generations": tables.generations(evaluation),
        "figure": plots.losses(run, evaluation, "losses" if only else f"losses-{name}"),
        "bars": plots.benchmarks(run, evaluation, "benchmarks" if only else f"benchmarks-{name}"),
    }


def _serving(run: Run, name: str, content: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "notes": serving_notes(content),
        "tables": serving_tables(run, content),
        "figures": serving_plots(run, content, "serving" if len(run.servings) == 1 else f"serving-{name}"),
    }


def _search(run: Run, name: str, results: dict[str, Any]) -> dict[str, Any] | None:
    """A search's parts; None, with a remark, where its results are not whole."""
    try:
        headings, rows = search.rows(results)
        roles = ["distilled" if row[0] == results["best"] else "other" for row in rows]
        table = tables.Table(f"Candidates of {name}, the best first", headings, rows, roles)
        figure = search.pareto(results, "pareto" if len(run.searches) == 1 else f"pareto-{name}")
        notes = [*search.notes(results), f"Chosen: {results['best']}."]
    except (KeyError, TypeError, ValueError) as error:
        run.remarks.append(f"the search of {name} is incomplete ({error!r}); left out")
        return None
    return {"name": name, "notes": notes, "table": table, "figure": figure}


def _started(text: Any) -> str | None:
    """When a stage started; None where its record does not say it."""
    try:
        return _moment(datetime.datetime.fromisoformat(text))
    except (TypeError, ValueError):
        return None


def _moment(time: datetime.datetime) -> str:
    return time.astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
