"""``minitron plan`` on the terminal: parameters, costs, memory by recomputation, layouts."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from nemo_minitron.cli.plan_layouts import layout_name
from nemo_minitron.config import ClusterConfig, ParallelLayout
from nemo_minitron.jobs.plans import human_count
from nemo_minitron.planning import (
    RECOMPUTE,
    LayoutCost,
    MemoryUse,
    Training,
    accelerator,
    best_layout,
    layout_cost,
    layout_costs,
    layout_faults,
)

__all__ = ["show_costs"]


def show_costs(
    trainings: Sequence[Training], cluster: ClusterConfig, console: Console, *, rows: int = 10
) -> list[list[LayoutCost]]:
    """Print the costs of each training.

    Args:
        trainings: in order.
        cluster: the GPUs.
        console: to print on.
        rows: number of layouts to show of each training; the recipe's own is shown in addition.

    Returns:
        Every layout of each training, the fastest first.
    """
    shown = []
    for training in trainings:
        costs = layout_costs(training, cluster)
        shown.append(costs)
        console.print(_parameters(training))
        console.print(_summary(training, cluster, costs))
        if (table := _memory(training, cluster, costs)) is not None:
            console.print(table)
        console.print(_layouts(training, costs, rows))
    return shown


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", min_width=72)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _parameters(training: Training) -> Table:
    models = {"student": training.student} | ({} if training.teacher is None else {"teacher": training.teacher})
    table = _table(f"{training.name}: parameters", "", *models)
    parts = [model.parts() for model in models.values()]
    for part in dict.fromkeys(part for names in parts for part in names):
        table.add_row(part, *(f"{names[part]:,}" if part in names else "" for names in parts))
    table.add_section()
    table.add_row("in all", *(f"{model.parameters:,}" for model in models.values()), style="bold")
    return table


def _summary(training: Training, cluster: ClusterConfig, costs: list[LayoutCost]) -> Table:
    table = Table(title=f"{training.name}: costs", title_justify="left", title_style="bold", show_header=False,
                  min_width=72)  # fmt: skip
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    gpu = accelerator(cluster)
    table.add_row(
        "tokens",
        f"{human_count(training.tokens)} in {training.steps:,} steps of {training.global_batch_size:,} x "
        f"{training.sequence_length:,}",
    )
    table.add_row("FLOPs", f"{training.flops:.3g}, {training.flops_per_step:.3g} a step")
    ideal = training.flops / (gpu.flops * cluster.mfu) / 3600
    table.add_row("GPU-hours", f"{ideal:,.0f} at {100 * cluster.mfu:.0f} % MFU of {cluster.gpu.upper()}")
    gpus = cluster.gpus or training.layout.world_size
    table.add_row("cluster", f"{gpus} x {cluster.gpu.upper()} of {gpu.memory / 2**30:.0f} GiB")
    best = best_layout(costs)
    if best is None:
        table.add_row("best layout", f"[red]none fits[/]{_nearest(training, cluster, costs)}")
        return table
    days = best.step_seconds * training.steps / 86400
    table.add_row("best layout", f"{layout_name(best.layout)}, recompute {best.recompute}: fits, least time of a step")
    table.add_row(
        "estimate",
        f"{best.gpu_hours:,.0f} GPU-hours, {days:,.1f} days, {100 * best.mfu:.0f} % MFU, with no traffic hidden",
    )
    if cluster.price is not None:
        table.add_row("price", f"{best.gpu_hours * cluster.price:,.0f}")
    for fault in layout_faults(training, training.layout):
        table.add_row("[yellow]own layout[/]", fault)
    if training.layout.world_size != gpus:
        sizes = f"{layout_name(training.layout)} takes {training.layout.world_size} GPUs"
        table.add_row("[yellow]own layout[/]", f"{sizes}, the cluster has {gpus}")
    return table


def _nearest(training: Training, cluster: ClusterConfig, costs: list[LayoutCost]) -> str:
    """The memory that would be needed, if no layout fits."""
    if not costs:
        gpus = cluster.gpus or training.layout.world_size
        return f": no layout of {gpus} GPUs can split these models and this batch"
    least = min(cost.fullest.total for cost in costs) / 2**30
    return f": the leanest layout needs {least:.1f} GiB within {100 * cluster.usable:.0f} % of a GPU's memory"


def _memory(training: Training, cluster: ClusterConfig, costs: list[LayoutCost]) -> Table | None:
    """The fullest rank under each recomputation, in the own layout or, if the cluster cannot run that, the best."""
    best, gpus = best_layout(costs), cluster.gpus or training.layout.world_size
    own = training.layout.world_size == gpus and not layout_faults(training, training.layout)
    layout = training.layout if own else best.layout if best else None
    if layout is None:
        return None
    table = _table(
        f"{training.name}: GiB of the fullest rank, {layout_name(layout)}",
        "recompute", "weights", "gradients", "optimizer", "activations", "teacher", "in all",
    )  # fmt: skip
    for recompute in RECOMPUTE:
        table.add_row(recompute, *_gib(layout_cost(training, layout, recompute, cluster).fullest))
    return table


def _layouts(training: Training, costs: list[LayoutCost], rows: int) -> Table:
    table = Table(
        title=f"{training.name}: layouts by the time of a step", title_justify="left", title_style="bold",
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption_justify="left",
    )  # fmt: skip
    table.add_column("TP x PP x DP", no_wrap=True)
    table.add_column("re-\ncompute", no_wrap=True)
    groups = {"TP": "tensor", "CP": "context", "PP": "pipeline", "DP": "data"}
    if all(cost.layout.context == 1 for cost in costs):
        del groups["CP"]
    for heading in ("GiB", *(f"{group}\nGB" for group in groups), "bub-\nble", "s a\nstep", "GPU-\nhours", "MFU"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    best = best_layout(costs)
    shown = ([cost for cost in costs if cost.fits] or costs)[:rows]
    shown += [cost for cost in costs if cost.layout == training.layout and cost not in shown]
    for cost in shown:
        marks = ["best"] if cost is best else []
        marks += ["own"] if cost.layout == training.layout else []
        marks += [] if cost.fits else ["too big"]
        table.add_row(
            _sizes(cost.layout),
            cost.recompute,
            f"{cost.fullest.total / 2**30:.1f}",
            *(_gigabytes(cost.sent[group]) for group in groups.values()),
            f"{100 * cost.bubble:.0f}%",
            f"{cost.step_seconds:.2f}",
            f"{cost.gpu_hours:,.0f}",
            f"{100 * cost.mfu:.0f}%",
            ", ".join(marks),
            style="bold green" if cost is best else None if cost.fits else "red",
        )
    left_out = len(costs) - len(shown)
    if left_out:
        table.caption = f"{left_out} more; {sum(not cost.fits for cost in costs)} of all {len(costs)} do not fit"
    return table


def _gib(use: MemoryUse) -> list[str]:
    parts = (use.weights, use.gradients, use.optimizer, use.activations, use.teacher, use.total)
    return [f"{part / 2**30:.1f}" if part >= 2**30 else f"{part / 2**30:.2f}" for part in parts]


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.0f}" if count >= 1e10 else f"{count / 1e9:.1f}" if count else "-"


def _sizes(layout: ParallelLayout) -> str:
    virtual = f"({layout.virtual_pipeline})" if layout.virtual_pipeline else ""
    context = f" (CP {layout.context})" if layout.context > 1 else ""
    return f"{layout.tensor} x {layout.pipeline}{virtual} x {layout.data}{context}"
