"""Put the report together: one HTML file that needs nothing beside it, and Markdown with its figures in ``plots/``."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any

from nemo_minitron.report import plots, tables
from nemo_minitron.report.collect import Run, collect

__all__ = ["write_report"]


def write_report(run_dir: str | Path, output: str | Path, *, title: str = "") -> Run:
    """Write ``index.html``, ``report.md`` and ``plots/*.png`` into ``output``.

    What the run does not hold is left out; what it holds and cannot be read is named at the end of the report.

    Args:
        run_dir: directory with the stages' outputs.
        output: an existing directory.
        title: heading; empty takes the run's name.

    Returns:
        What was found.

    Raises:
        DataError: if ``run_dir`` holds no finished stage.
    """
    import jinja2

    run = collect(run_dir)
    content = _content(run, title or run.name)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nemo_minitron.report", "templates"),
        autoescape=jinja2.select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _markdown_cell
    environment.filters["quote"] = _markdown_quote
    out = Path(output)
    html = environment.get_template("index.html.j2").render(content)
    (out / "index.html").write_text(html, encoding="utf-8")
    markdown = environment.get_template("report.md.j2").render(content)
    (out / "report.md").write_text(re.sub(r"\n{3,}", "\n\n", markdown), encoding="utf-8")
    figures = [figure for section in content["figures"].values() for figure in section]
    if figures:
        (out / "plots").mkdir()
    for figure in figures:
        (out / "plots" / f"{figure.name}.png").write_bytes(figure.light)
    return run


def _content(run: Run, title: str) -> dict[str, Any]:
    """Everything that the templates show."""
    evaluations = [
        {
            "name": name,
            "table": tables.loss_table(run, evaluation),
            "recoveries": tables.recoveries(run, evaluation),
            "generations": tables.generations(evaluation),
            "figure": plots.losses(run, evaluation),
        }
        for name, evaluation in run.evaluations
    ]
    score_figures = [
        figure
        for scores in run.scores
        for draw in (plots.neurons, plots.heads, plots.layers, plots.hidden)
        if (figure := draw(scores, run)) is not None
    ]
    training = [figure for curve in run.curves if (figure := plots.training(run, curve)) is not None]
    started = next((stage.record.get("started") for stage in run.stages if stage.record.get("started")), None)
    return {
        "title": title,
        "run": run,
        "started": None if started is None else _moment(datetime.datetime.fromisoformat(started)),
        "written": _moment(datetime.datetime.now(datetime.UTC)),
        "cards": tables.cards(run),
        "boxes": tables.step_boxes(run),
        "shapes": tables.shape_table(run),
        "evaluations": evaluations,
        "figures": {"losses": [e["figure"] for e in evaluations], "scores": score_figures, "training": training},
        "stages": tables.stage_table(run),
        "exports": tables.export_table(run),
        "versions": tables.versions(run),
        "configs": [(stage.name, json.dumps(stage.config, indent=2, default=str)) for stage in run.stages],
        "roles": run.roles,
    }


def _moment(time: datetime.datetime) -> str:
    return time.astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _markdown_cell(text: str) -> str:
    """Text that stays within its cell and has no markup."""
    for character in "\\`*_{}[]<>|#":
        text = text.replace(character, "\\" + character)
    return " ".join(text.split())


def _markdown_quote(text: str) -> str:
    """Text as a block quote, every line of it, without markup."""
    lines = [_markdown_cell(line) for line in text.splitlines()] or [""]
    return "\n".join(f"> {line}".rstrip() for line in lines)
