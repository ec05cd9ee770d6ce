"""What a run cost: processes, GPU-hours spent and allowed, and their price."""

from __future__ import annotations

from typing import Any

from nemo_minitron.report.run import Run, StageRun
from nemo_minitron.report.tables import Table, duration

__all__ = ["cost_table", "gpu_hours", "ranks_of"]

_AXES = ("tensor", "pipeline", "data", "context")


def ranks_of(stage: StageRun) -> int:
    """Processes that ran at once: as recorded, or in older records by the layouts."""
    if isinstance(ranks := stage.record.get("ranks"), int):
        return ranks
    ranks = _world_size(stage.config.get("parallel"))
    if stage.config.get("teacher_placement") == "own_ranks":
        ranks += _world_size(stage.config.get("teacher_parallel"))
    return ranks


def _world_size(layout: Any) -> int:
    product = 1
    for axis in _AXES if isinstance(layout, dict) else ():
        product *= int(layout.get(axis) or 1)
    return product


def gpu_hours(stage: StageRun) -> float | None:
    """GPUs times wall time; None where the record does not say whether GPUs were used."""
    gpus = _gpus(stage)
    return None if gpus is None else gpus * stage.seconds / 3600


def _gpus(stage: StageRun) -> int | None:
    if isinstance(gpus := stage.record.get("gpus"), int):
        return gpus
    runtime = stage.config.get("runtime")
    device = runtime.get("device") if isinstance(runtime, dict) else None
    if device == "cpu" or not stage.kind.NEEDS_GPU:
        return 0
    return ranks_of(stage) if device == "cuda" else None


def _limit_hours(stage: StageRun) -> float | None:
    """Hours after which the stage would have been ended: its own limit of training time, or that of its processes."""
    runtime = stage.config.get("runtime")
    limits = (stage.config.get("max_minutes"), runtime.get("timeout_minutes") if isinstance(runtime, dict) else None)
    given = [float(limit) for limit in limits if isinstance(limit, int | float)]
    return min(given) / 60 if given else None


def cost_table(run: Run, *, price: float | None = None, currency: str = "") -> Table:
    """Time, processes and GPU-hours of every stage, and their sum.

    GPU-hours are GPUs times wall time, so time in which they waited counts. What was allowed is the number of processes
    times the stage's time limit (``max_minutes``, else ``runtime.timeout_minutes``).

    Args:
        run: the run.
        price: of a GPU-hour; None leaves the column out.
        currency: of the price.
    """
    rows = [_row(stage, price) for stage in run.stages]
    known = [hours for stage in run.stages if (hours := gpu_hours(stage)) is not None]
    unknown = len(run.stages) - len(known)
    ranks = [ranks_of(stage) * stage.seconds / 3600 for stage in run.stages]
    limits = [None if (hours := _limit_hours(stage)) is None else hours * ranks_of(stage) for stage in run.stages]
    allowed = None if not limits or None in limits else sum(limit for limit in limits if limit is not None)
    total = ["all", "", duration(sum(stage.seconds for stage in run.stages)), "", "", _hours(sum(ranks))]
    total += [_hours(sum(known)) + (" + ?" if unknown else ""), _hours(allowed)]
    if price is not None:
        total.append(_money(sum(known) * price) + (" + ?" if unknown else ""))
    headings = ["stage", "kind", "time", "processes", "GPUs", "process-hours", "GPU-hours", "allowed at most"]
    headings += [f"price{f', {currency}' if currency else ''}"] if price is not None else []
    notes = ["hours are processes, or GPUs, times wall time; allowed are processes times the stage's time limit"]
    if price is not None:
        notes.append(f"a GPU-hour at {_money(price)}{f' {currency}' if currency else ''}")
    if unknown:
        stages = "record of 1 stage does" if unknown == 1 else f"records of {unknown} stages do"
        notes.append(f"the {stages} not say whether GPUs were used")
    return Table(f"What it cost; {'; '.join(notes)}", headings, [*rows, total], ["" for _ in [*rows, total]])


def _row(stage: StageRun, price: float | None) -> list[str]:
    ranks, gpus, hours, limit = ranks_of(stage), _gpus(stage), gpu_hours(stage), _limit_hours(stage)
    row = [stage.name, stage.stage, duration(stage.seconds), f"{ranks:,}", "?" if gpus is None else f"{gpus:,}"]
    row += [_hours(ranks * stage.seconds / 3600), _hours(hours), _hours(None if limit is None else limit * ranks)]
    return row if price is None else [*row, "–" if hours is None else _money(hours * price)]


def _hours(value: float | None) -> str:
    """Three significant digits; "–" for what is not known."""
    if value is None:
        return "–"
    if value == 0 or value >= 100:
        return f"{value:,.0f}"
    return "< 0.01" if value < 0.01 else f"{value:.3g}"


def _money(value: float) -> str:
    return f"{value:,.2f}"
