"""Rows of the plans of stages that prune."""

from __future__ import annotations

from nemo_minitron.config import IterateConfig, PruneConfig
from nemo_minitron.jobs.plans import StagePlan, human_count
from nemo_minitron.planning import Model
from nemo_minitron.shape import ModelShape
from nemo_minitron.stages.shared.disk import checkpoint_need, described, expected

__all__ = ["plan_pruned"]


def plan_pruned(plan: StagePlan, config: PruneConfig | IterateConfig, model: Model, target: ModelShape) -> None:
    """Add to a plan the shape that is pruned to, its share of the parameters, and the disk space of the result."""
    pruned = Model(target, model.architecture)
    before, after = model.parameters, pruned.parameters
    plan.costs["target"] = described(pruned)
    plan.costs["parameters"] = f"{human_count(before)} -> {human_count(after)} ({100 * after / before:.1f} %)"
    chosen_later = target.num_layers != model.shape.num_layers and model.architecture.layer_types is not None
    plan.makes[config.output] = (
        None if chosen_later else expected(pruned, config.model)
    )  # which types stay is not known
    plan.disk.append(checkpoint_need("model", config.output, pruned, config.format))
