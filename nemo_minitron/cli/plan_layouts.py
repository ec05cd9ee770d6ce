"""The stages of a plan with layouts for its cluster, as ``minitron plan --save`` writes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from nemo_minitron.config import (
    AlignConfig,
    ClusterConfig,
    DistillConfig,
    ParallelLayout,
    PruneConfig,
    ReconstructConfig,
    SftConfig,
    StageConfig,
)
from nemo_minitron.errors import ConfigError
from nemo_minitron.planning import LayoutCost, Training, best_layout, layout_costs

__all__ = ["layout_name", "own_cost", "saved_stages"]


def layout_name(layout: ParallelLayout) -> str:
    """``TP 4 x PP 1 x DP 64``."""
    virtual = f" (virtual {layout.virtual_pipeline})" if layout.virtual_pipeline else ""
    context = f" x CP {layout.context}" if layout.context > 1 else ""
    return f"TP {layout.tensor} x PP {layout.pipeline}{virtual} x DP {layout.data}{context}"


def own_cost(training: Training, costs: Sequence[LayoutCost]) -> LayoutCost | None:
    """The costs under the layout that a training asks for; None where that is not one of the cluster's, or too big."""
    own = (cost for cost in costs if cost.layout == training.layout and cost.recompute == training.recompute)
    return next((cost for cost in own if cost.fits), None)


def saved_stages(
    stages: Sequence[StageConfig], trainings: Sequence[Training], cluster: ClusterConfig
) -> tuple[list[StageConfig], list[str]]:
    """The stages with layouts that a cluster can run: their own where it can, else those of the plan.

    A training whose layout is too large or does not fit into memory gets the plan's best layout, and its recomputation.
    A stage that only runs models forward, and is too large, gets the layout of a training of its model.

    Args:
        stages: in order.
        trainings: of the plan, of the same names.
        cluster: the GPUs.

    Returns:
        The stages, and a remark on each change.

    Raises:
        ConfigError: with every stage that cannot run on the cluster.
    """
    chosen: dict[str, LayoutCost] = {}
    faults: list[str] = []
    for training in trainings:
        costs = layout_costs(training, cluster)
        best = own_cost(training, costs) or best_layout(costs)
        if best is None:
            faults.append(f"{training.name}: no layout of the cluster fits; nothing is saved")
        else:
            chosen[training.name] = best
    if faults:
        raise ConfigError(faults)
    users = _users(stages, chosen)
    written: list[StageConfig] = []
    changes: list[str] = []
    for stage in stages:
        name = stage.name or stage.STAGE
        settings = _settings(stage, chosen.get(name), users, cluster)
        new = dataclasses.replace(stage, **settings)
        faults += [f"{name}: cannot run on this cluster: {fault}" for fault in _new_faults(stage, new)]
        if cluster.gpus is not None and new.started > cluster.gpus:
            faults.append(
                f"{name}: takes {new.started} GPUs of the cluster's {cluster.gpus}; set stages.{name}.parallel"
            )
        if settings:
            layout = next(value for value in settings.values() if isinstance(value, ParallelLayout))
            recompute = f", recompute {settings['recompute']}" if "recompute" in settings else ""
            changes.append(f"{name}: is saved with {layout_name(layout)}{recompute}, for the cluster")
        written.append(new)
    if faults:
        raise ConfigError(faults)
    return written, changes


def _users(stages: Sequence[StageConfig], chosen: dict[str, LayoutCost]) -> dict[str, ParallelLayout]:
    """The layout of a training by each model that it reads or writes; by "" that of any."""
    users: dict[str, ParallelLayout] = {}
    for stage in stages:
        cost = chosen.get(stage.name or stage.STAGE)
        if cost is not None:
            for path in (*stage.inputs().values(), f"{stage.output}/model", ""):
                users.setdefault(path, cost.layout)
    for stage in stages:
        if isinstance(stage, ReconstructConfig) and stage.output in users:  # who trains the one trains the other
            users.setdefault(stage.model, users[stage.output])
    return users


def _settings(
    stage: StageConfig, cost: LayoutCost | None, users: dict[str, ParallelLayout], cluster: ClusterConfig
) -> dict[str, Any]:
    """The settings of a stage that the plan changes."""
    own: ParallelLayout | None = getattr(stage, "parallel", None)
    if cost is not None:
        settings: dict[str, Any] = {} if own == cost.layout else {"parallel": cost.layout}
        recompute = getattr(stage, "recompute", cost.recompute)
        if not isinstance(stage, SftConfig) and recompute != cost.recompute:
            settings = {"parallel": cost.layout, "recompute": cost.recompute}
        return settings
    if isinstance(stage, PruneConfig):
        layout = users.get(stage.output)
        fitting = stage.student_layout == ParallelLayout() or layout is None
        return {} if fitting or stage.student_layout == layout else {"student_layout": layout}
    if own is None or cluster.gpus is None or own.world_size <= cluster.gpus or isinstance(stage, AlignConfig):
        return {}
    if isinstance(stage, ReconstructConfig):
        return {"parallel": ParallelLayout(data=cluster.gpus)}
    layout = next((users[path] for path in stage.inputs().values() if path in users), users.get(""))
    if layout is None:
        return {}
    data = max(1, cluster.gpus // (layout.tensor * layout.pipeline))
    return {"parallel": ParallelLayout(layout.tensor, layout.pipeline, data, None, layout.sequence_parallel)}


def _new_faults(before: StageConfig, after: StageConfig) -> list[str]:
    """What a stage refuses with its new layout, and did not with its own."""
    if after == before:
        return []
    if isinstance(after, DistillConfig) and after.taught and after.teacher_placement != "shared":
        return [f"teacher_placement={after.teacher_placement} is planned as if it were shared; set it to shared"]
    known = set(before.faults())
    return [fault for fault in after.faults() if fault not in known]
