"""``--dry-run``: tables of the paths that stages would read and write, and of their costs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from nemo_minitron.config import StageConfig
from nemo_minitron.errors import ConfigError
from nemo_minitron.jobs.dry_run import planned
from nemo_minitron.jobs.plans import PlannedPath, StagePlan, human_bytes

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
    for name, config, plan, produced, of_stage in planned(configs, alone=alone):
        if plan is not None:
            console.print(_table(name, config, plan, produced))
        faults += [f"{name}: {fault}" for fault in of_stage]
    if faults:
        raise ConfigError(faults, source=source)


def _table(name: str, config: StageConfig, plan: StagePlan, produced: set[str]) -> Table:
    title = name if name == plan.stage else f"{name} ({plan.stage})"
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, min_width=72)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for item in plan.reads:
        table.add_row("reads", f"{item.what}: {item.path} [dim]({_state(item, produced)})[/]")
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
    for note in plan.notes:
        table.add_row("note", note)
    for fault in plan.faults:
        table.add_row("[red]fault[/]", f"[red]{fault}[/]")
    return table


def _state(item: PlannedPath, produced: set[str]) -> str:
    """The state of an input: its size, the stage that will write it, or that it is missing."""
    if item.exists():
        return human_bytes(item.size() or 0)
    return "written by earlier stages" if item.comes_from(produced) else "[red]missing[/]"
