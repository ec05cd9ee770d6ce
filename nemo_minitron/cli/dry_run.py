"""``--dry-run``: tables of the paths that stages would read and write, and of their costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nemo_minitron.cli.expected_time import expected_time
from nemo_minitron.config import StageConfig
from nemo_minitron.errors import ConfigError
from nemo_minitron.jobs.dry_run import Planned, planned
from nemo_minitron.jobs.plans import PlannedPath, StagePlan, human_bytes
from nemo_minitron.jobs.space import FileSystem, file_systems, space_faults
from nemo_minitron.runtime.disk import room

__all__ = ["show_plans"]


def show_plans(configs: Sequence[StageConfig], console: Console, source: str, *, alone: bool = False) -> None:
    """Print the plan of each stage, in order; outputs of earlier stages count as existing.

    Args:
        configs: of the stages.
        console: for the tables.
        source: name of the configuration, for the heading.
        alone: each stage would run by itself, and could not resume an output of other settings.

    Raises:
        ConfigError: with every fault that the plans found, after the tables are printed.
    """
    faults: list[str] = []
    todo: list[tuple[str, StagePlan, float]] = []
    for stage in planned(configs, alone=alone):
        if stage.plan is not None:
            console.print(_table(stage, alone=alone))
            if not stage.is_done or alone:
                todo.append((stage.name, stage.plan, stage.present))
        faults += [f"{stage.name}: {fault}" for fault in stage.faults]
    systems = file_systems(todo)
    if len(configs) > 1:
        for system in systems:
            console.print(_in_all(system), highlight=False)
        if unknown := [name for name, plan, _ in todo if None in plan.makes.values() and not plan.disk]:
            console.print(f"disk space not known before they run: {', '.join(unknown)}", highlight=False)
    faults += space_faults(systems)
    if faults:
        raise ConfigError(faults, source=source)


def _table(stage: Planned, *, alone: bool) -> Table:
    name, config, plan = stage.name, stage.config, stage.plan
    assert plan is not None
    title = name if name == plan.stage else f"{name} ({plan.stage})"
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, min_width=72)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    if stage.is_done and not alone:
        table.add_row("state", "done before, and kept")
    for item in plan.reads:
        table.add_row("reads", f"{item.what}: {item.path} [dim]({_state(item, stage.produced)})[/]")
    for item in plan.writes:
        there = " [yellow](exists)[/]" if item.exists() else ""
        table.add_row("writes", f"{item.what}: {item.path}{there}")
    layout = config.layout
    size = "1 process" if layout.world_size == 1 else f"{layout.world_size} processes"
    context = f" x context {layout.context}" if layout.context > 1 else ""
    expert = f" (experts over {layout.expert})" if layout.expert > 1 else ""
    sizes = f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}{context}{expert}"
    table.add_row("layout", f"{sizes} = {size}")
    for what, value in plan.costs.items():
        table.add_row(what, value)
    if not stage.is_done or alone:
        table.add_row("time", expected_time(config, plan))
    for row in _disk(stage):
        table.add_row("disk", row)
    for note in plan.notes:
        table.add_row("note", escape(note))  # which may name an extra: "nemo-minitron[report]"
    if plan.faults:  # the message at the end has each, once
        count = len(plan.faults)
        table.add_row("[red]faults[/]", f"[red]{count}, named below[/]")
    return table


def _disk(stage: Planned) -> list[str]:
    """What a stage writes, for each file system, and what is free there."""
    assert stage.plan is not None
    rows = []
    for system in file_systems([(stage.name, stage.plan, stage.present)]):
        place = system.room
        parts = [need for need in stage.plan.disk if (own := room(Path(need.path))) and own.device == place.device]
        named = ", ".join(f"{need.what} {human_bytes(need.bytes)}" for need in parts)
        there = f", of which {human_bytes(stage.present)} are there" if stage.present else ""
        stay = f"; {human_bytes(system.staying)} stay" if system.staying < system.needed else ""
        short = system.is_short
        free = f"{human_bytes(place.free)} are free on {place.mount}"
        rows.append(f"{named}{there}{stay}; {f'[red]{free}[/]' if short else free}")
    return rows


def _in_all(system: FileSystem) -> str:
    """The line of a file system, for all stages that are not done."""
    place = system.room
    free = f"{human_bytes(place.free)} are free"
    return (
        f"disk {place.mount}: {human_bytes(system.needed)} for all stages that are not done, of which "
        f"{human_bytes(system.staying)} stay; {f'[red]{free}[/]' if system.is_short else free}"
    )


def _state(item: PlannedPath, produced: frozenset[str]) -> str:
    """The state of an input: its size, the stage that will write it, or that it is missing."""
    if item.exists():
        return human_bytes(item.size() or 0)
    return "written by earlier stages" if item.comes_from(produced) else "[red]missing[/]"
