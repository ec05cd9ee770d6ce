"""``minitron iterate``: score, prune, score again: a target reached in several rounds, without training in between."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from nemo_minitron import axes
from nemo_minitron.checkpoints.model_record import peek_family, peek_shape
from nemo_minitron.config import IterateConfig
from nemo_minitron.errors import ShapeError
from nemo_minitron.importance.estimators import ESTIMATORS
from nemo_minitron.jobs.plans import PlannedPath, StagePlan, human_count
from nemo_minitron.pruning.kept import kept_path
from nemo_minitron.runtime.progress import progress_bar
from nemo_minitron.stages.shared.checkpoints import format_faults, staged_checkpoint
from nemo_minitron.stages.shared.iterate_rounds import prune_in_rounds, round_shapes, rounds_folder
from nemo_minitron.stages.shared.measuring import plan_measuring
from nemo_minitron.stages.shared.memory import planned_model
from nemo_minitron.stages.shared.pruned import plan_pruned
from nemo_minitron.stages.shared.target import plan_target, target_lineage

if TYPE_CHECKING:
    from nemo_minitron.axes import KeptUnits
    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.shape import ModelShape

__all__ = ["plan", "run"]

logger = logging.getLogger(__name__)


def plan(config: IterateConfig) -> StagePlan:
    """What :func:`run` would read, write and cost."""
    shape = peek_shape(config.model)
    written = PlannedPath(config.output, f"pruned model ({config.format})")
    plan = plan_measuring(config, "iterate", written, repeated=", in each round")
    plan.faults += format_faults(config.output, config.format)
    if done := len(list(rounds_folder(config).glob("round-*.json"))):
        plan.notes.append(f"goes on after round {done} of {config.rounds}, if model, text and settings are the same")
    plan.makes[config.output] = None
    sizes = plan_target(plan, config.target)
    if sizes is None:
        plan.costs["target"] = "the shape that the search chooses"
    if shape is None or sizes is None:
        return plan
    try:
        shapes = round_shapes(config, shape, sizes)
    except ShapeError as error:
        plan.faults += error.faults
        return plan
    table = peek_family(config.model)
    counts = [axes.parameter_count(table, step) for step in (shape, *shapes)]
    if (model := planned_model(config.model)) is not None:
        plan_pruned(plan, config, model, shapes[-1])
    plan.costs["parameters"] = " -> ".join(human_count(count) for count in counts)
    passes = ESTIMATORS[config.estimator].passes
    tokens = config.samples * config.data.sequence_length
    plan.flops = 2.0 * passes * tokens * sum(counts[:-1])
    plan.costs["FLOPs"] = human_count(plan.flops)
    return plan


def run(config: IterateConfig) -> dict[str, Any]:
    """Prune in rounds. Every rank runs this; rank 0 writes the pruned checkpoint and ``kept.json``.

    A round's model is never written: it is defined by its kept units, as indices into the unpruned model.

    Returns:
        ``rounds, resumed, parameters_before, parameters, share, shape, layers, seconds``.

    Raises:
        MinitronError: for a checkpoint or text that cannot be used, or a target that cannot be reached.
    """
    started = time.monotonic()
    result = prune_in_rounds(config)
    checkpoint, groups, shapes, kept = result.checkpoint, result.groups, result.shapes, result.kept
    shape = checkpoint.shape
    before, after = (axes.parameter_count(checkpoint.family, step) for step in (shape, shapes[-1]))
    if groups.is_main:
        _write(config, checkpoint, kept, shapes)
        result.saved.clear()
        logger.info("%s -> %s parameters in %d rounds", human_count(before), human_count(after), len(shapes))
    return {
        "rounds": [step.to_dict() for step in shapes],
        "resumed": result.resumed,
        "parameters_before": before,
        "parameters": after,
        "share": round(after / before, 6),
        "shape": shapes[-1].to_dict(),
        "layers": list(kept.layers),
        "seconds": round(time.monotonic() - started, 3),
    }


def _write(config: IterateConfig, checkpoint: Checkpoint, kept: KeptUnits, shapes: list[ModelShape]) -> None:
    from nemo_minitron.checkpoints import write_checkpoint
    from nemo_minitron.pruning import prune_weights, save_kept

    lineage = {
        "method": config.estimator,
        "rounds": [step.to_dict() for step in shapes],
        "samples": config.samples,
        "aggregation": {"sequence": config.aggregation.sequence, "batch": config.aggregation.batch},
        **({"loss": config.taylor.loss} if ESTIMATORS[config.estimator].gradients else {}),
    } | target_lineage(config.target)
    pruned = prune_weights(checkpoint, kept, lineage=lineage)
    with (
        staged_checkpoint(config.output, config.format, overwrite=config.overwrite) as path,
        progress_bar("pruning", len(pruned.weights.names())) as advance,
    ):
        write_checkpoint(pruned, path, config.format, progress=lambda name, done, total: advance(1))
        save_kept(kept, checkpoint.shape, kept_path(path if path.is_dir() else config.output))
