"""``minitron status``: a table of the stages of a run, and a line for each that is not simply done."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nemo_minitron.cli.expected_time import clock
from nemo_minitron.cli.progress import elapsed
from nemo_minitron.jobs.status import RunStatus, StageStatus, status_of

__all__ = ["show_status", "status_json"]

_STYLES = {
    "done": "green", "running": "cyan", "queued": "cyan", "failed": "red", "dead": "red", "damaged": "red",
    "cancelled": "red", "timeout": "red", "stopped": "yellow", "out of date": "yellow", "unfinished": "yellow",
}  # fmt: skip


def show_status(path: Path, console: Console) -> None:
    """Print how far the run in a directory is, or the stage of an output.

    Raises:
        ConfigError: if there is neither.
    """
    run = status_of(path)
    table = Table(title=f"{escape(run.name)}: {escape(str(path))}", title_justify="left")
    for heading in ("stage", "state", "time", "output"):
        table.add_column(heading, justify="right" if heading == "time" else "left", overflow="fold")
    for stage in run.stages:
        table.add_row(
            escape(stage.name),
            f"[{_STYLES.get(stage.state, 'dim')}]{stage.state}[/]",
            "" if stage.seconds is None else elapsed(stage.seconds),
            escape(stage.output),
        )
    console.print(table)
    for stage in run.stages:
        for line in _lines(stage):
            console.print(f"{stage.name}: {line}", markup=False, highlight=False, soft_wrap=True)
    for remark in run.remarks:
        console.print(remark, markup=False, highlight=False, soft_wrap=True)
    if run.earlier:
        console.print("Kept of other settings, and used again if they come back:", highlight=False)
        for place in run.earlier:
            console.print(f"  {place}", markup=False, highlight=False, soft_wrap=True)


def status_json(path: Path) -> str:
    """The same for programs: an object with ``name``, ``stages``, ``earlier`` and ``remarks``."""
    run: RunStatus = status_of(path)
    return json.dumps(dataclasses.asdict(run), indent=2, default=str)


def _lines(stage: StageStatus) -> list[str]:
    """What is to be said of a stage beyond its row."""
    if stage.state == "done":
        return []
    lines = []
    if stage.step is not None:
        of = "" if stage.steps is None else f" of {stage.steps:,}"
        left = "" if stage.left is None or stage.state != "running" else f", about {clock(stage.left)} left"
        lines.append(f"{stage.unit or 'at'} {stage.step:,}{of}{left}")
    if stage.error is not None:
        code = "" if stage.exit_code is None else f" (exit code {stage.exit_code})"
        log = "" if stage.log is None else f"; log: {stage.log}"
        lines.append(f"{stage.error}{code}{log}")
    elif stage.process is not None:
        lines.append(stage.process)
    if stage.state in ("damaged", "out of date") and stage.finished:
        ended = datetime.datetime.fromisoformat(stage.finished).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        lines.append(f"made until {ended}; the next run makes it again")
    if stage.state in ("stopped", "dead", "unfinished"):
        lines.append("the command that started it goes on, or makes it again")
    return lines
