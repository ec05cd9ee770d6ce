"""Write the report: one self-contained HTML file, and Markdown with its figures in ``plots/``."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import DataError
from nemo_minitron.report import plots, tables
from nemo_minitron.report.alignment import alignment_tables
from nemo_minitron.report.ancestry import ancestry
from nemo_minitron.report.card import card_content, export_content
from nemo_minitron.report.collect import Run, collect
from nemo_minitron.report.compare import Comparison, compare
from nemo_minitron.report.diagram import shape_diagram
from nemo_minitron.report.lineage import lineage_table

if TYPE_CHECKING:
    import jinja2

    from nemo_minitron.checkpoints import Checkpoint

__all__ = ["write_comparison", "write_export_card", "write_report"]


def write_report(
    run_dir: str | Path,
    output: str | Path,
    *,
    title: str = "",
    base_model: str | None = None,
    license_name: str | None = None,
) -> Run:
    """Write ``index.html``, ``report.md``, ``plots/*.png`` and, for a run that made a model, ``model-card.md``.

    Parts that the run does not have are left out; files that cannot be read are listed at the end of the report.

    Args:
        run_dir: directory with the stages' outputs.
        output: an existing directory.
        title: heading; empty takes the run's name.
        base_model, license_name: for the front matter of the model card, as the Hub names them.

    Returns:
        The contents of the run.

    Raises:
        DataError: if ``run_dir`` holds no finished stage.
    """
    run = collect(run_dir)
    content = _content(run, title or run.name)
    environment = _environment()
    out = Path(output)
    figures = [figure for section in content["figures"].values() for figure in section]
    _write(environment, "index.html.j2", content, out / "index.html")
    _write(environment, "report.md.j2", content, out / "report.md")
    _write_figures(figures, out)
    card = card_content(run, title or run.name, base_model=base_model, license_name=license_name)
    if card is not None:
        _write(environment, "model-card.md.j2", card, out / "model-card.md")
    return run


def write_export_card(
    model: Checkpoint,
    file: Path,
    *,
    run_dir: Path | None = None,
    base_model: str | None = None,
    license_name: str | None = None,
) -> None:
    """Write the model card that lies beside an exported model.

    Args:
        model: the model that is exported, at the path where its stage wrote it.
        file: the card.
        run_dir: directory of the stages' outputs, one of which made the model; None if it is not known. What cannot be
            read there is left out.
        base_model, license_name: see :func:`~nemo_minitron.report.card.export_content`.
    """
    try:
        run = None if run_dir is None else ancestry(collect(run_dir), model.path)
    except DataError:
        run = None
    content = export_content(model, run, base_model=base_model, license_name=license_name)
    _write(_environment(), "model-card.md.j2", content, file)


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
    environment, out = _environment(), Path(output)
    _write(environment, "compare.html.j2", content, out / "index.html")
    _write(environment, "compare.md.j2", content, out / "report.md")
    _write_figures(comparison.figures, out)
    return comparison


def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nemo_minitron.report", "templates"),
        autoescape=jinja2.select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _markdown_cell
    environment.filters["quote"] = _markdown_quote
    return environment


def _write(environment: jinja2.Environment, template: str, content: dict[str, Any], path: Path) -> None:
    text = environment.get_template(template).render(content)
    if path.suffix == ".md":
        text = re.sub(r"\n{3,}", "\n\n", text).lstrip()
    path.write_text(text, encoding="utf-8")


def _write_figures(figures: Sequence[plots.Figure], out: Path) -> None:
    if figures:
        (out / "plots").mkdir()
    for figure in figures:
        (out / "plots" / f"{figure.name}.png").write_bytes(figure.light)


def _content(run: Run, title: str) -> dict[str, Any]:
    """Everything that the templates show."""
    evaluations = [
        {
            "name": name,
            "table": tables.loss_table(run, evaluation),
            "recoveries": tables.recoveries(run, evaluation),
            "benchmarks": tables.benchmark_table(run, evaluation),
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
    diagram = shape_diagram(run)
    started = next((stage.record.get("started") for stage in run.stages if stage.record.get("started")), None)
    return {
        "title": title,
        "run": run,
        "started": None if started is None else _moment(datetime.datetime.fromisoformat(started)),
        "written": _moment(datetime.datetime.now(datetime.UTC)),
        "cards": tables.cards(run),
        "boxes": tables.step_boxes(run),
        "shapes": tables.shape_table(run),
        "diagram": diagram,
        "lineage": lineage_table(run),
        "evaluations": evaluations,
        "alignment": alignment_tables(run),
        "figures": {
            "shapes": [] if diagram is None else [diagram],
            "losses": [e["figure"] for e in evaluations],
            "scores": score_figures,
            "training": training,
        },
        "stages": tables.stage_table(run),
        "exports": tables.export_table(run),
        "versions": tables.versions(run),
        "configs": [(stage.name, json.dumps(stage.config, indent=2, default=str)) for stage in run.stages],
        "roles": run.roles,
    }


def _moment(time: datetime.datetime) -> str:
    return time.astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _markdown_cell(text: str) -> str:
    """Text escaped for a table cell, without markup."""
    for character in "\\`*_{}[]<>|#":
        text = text.replace(character, "\\" + character)
    return " ".join(text.split())


def _markdown_quote(text: str) -> str:
    """Text as a block quote, escaped, without markup."""
    lines = [_markdown_cell(line) for line in text.splitlines()] or [""]
    return "\n".join(f"> {line}".rstrip() for line in lines)
