"""``minitron prune``: take the units that matter least out of a checkpoint. One process, one tensor at a time."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron import axes
from nemo_minitron.config import PruneConfig
from nemo_minitron.errors import ShapeError
from nemo_minitron.runtime.progress import progress_bar
from nemo_minitron.stages.base import PlannedPath, StagePlan, human_count, peek_family, peek_shape
from nemo_minitron.stages.conversion import format_faults, staged_checkpoint

if TYPE_CHECKING:
    from nemo_minitron.importance import Scores

__all__ = ["kept_path", "plan", "run"]

logger = logging.getLogger(__name__)


def kept_path(output: str | Path) -> Path:
    """Where the record of the kept units lies: inside a directory, beside a ``.nemo`` file."""
    output = Path(output)
    return output.with_name(output.name + ".kept.json") if output.suffix == ".nemo" else output / "kept.json"


def plan(config: PruneConfig) -> StagePlan:
    """What :func:`run` would read, write and cost."""
    from nemo_minitron.pruning.choose import target_shape

    found = StagePlan(
        "prune",
        reads=[PlannedPath(config.model, "model")],
        writes=[PlannedPath(config.output, f"pruned model ({config.format})")],
        faults=format_faults(config.output, config.format),
    )
    if config.method == "activation" and config.scores is not None:
        found.reads.append(PlannedPath(config.scores, "scores"))
    if config.depth_scores is not None:
        found.reads.append(PlannedPath(config.depth_scores, "depth scores"))
    shape = peek_shape(config.model)
    if shape is not None:
        try:
            target = target_shape(shape, config.target.given(), layers_to_drop=config.layers_to_drop)
        except ShapeError as error:
            found.faults += error.faults
        else:
            before, after = (axes.parameter_count(peek_family(config.model), one) for one in (shape, target))
            found.costs["parameters"] = f"{human_count(before)} -> {human_count(after)} ({100 * after / before:.1f} %)"
    found.notes.append("reads and writes one tensor at a time; no forward pass")
    return found


def run(config: PruneConfig) -> dict[str, Any]:
    """Prune the checkpoint, and record the kept units in ``kept.json``.

    Returns:
        ``method, parameters_before, parameters, share, shape, layers`` (the kept ones).

    Raises:
        MinitronError: for a checkpoint or scores that cannot be used, or a target that cannot be reached.
    """
    from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
    from nemo_minitron.pruning import choose_units, prune_weights, save_kept, target_shape

    checkpoint = open_checkpoint(config.model)
    target = target_shape(checkpoint.shape, config.target.given(), layers_to_drop=config.layers_to_drop)
    scores = _scores(config, checkpoint)
    kept = choose_units(
        scores,
        checkpoint.shape,
        target,
        method=config.method,
        seed=config.runtime.seed,
        layers_to_drop=_layers_to_drop(config, checkpoint, target.num_layers, scores),
    )
    pruned = prune_weights(checkpoint, kept, lineage=_lineage(config, scores))
    with (
        staged_checkpoint(config.output, config.format, overwrite=config.overwrite) as path,
        progress_bar("pruning", len(pruned.weights.names())) as advance,
    ):
        write_checkpoint(pruned, path, config.format, progress=lambda name, done, total: advance(1))
        # Of a directory, a part that comes with it; of a file, a companion that is there before it is.
        if path.is_dir():
            save_kept(kept, checkpoint.shape, kept_path(path))
        else:
            save_kept(kept, checkpoint.shape, kept_path(config.output))

    before, after = (axes.parameter_count(checkpoint.family, shape) for shape in (checkpoint.shape, target))
    logger.info("%s -> %s parameters (%.1f %%)", human_count(before), human_count(after), 100 * after / before)
    return {
        "method": config.method,
        "parameters_before": before,
        "parameters": after,
        "share": round(after / before, 6),
        "shape": target.to_dict(),
        "layers": list(kept.layers),
    }


def _layers_to_drop(
    config: PruneConfig, checkpoint: Any, num_layers: int, scores: Scores | None
) -> Sequence[int] | None:
    """The layers named, or those that the depth criterion takes; None leaves them to the method."""
    from nemo_minitron.importance import DepthScores, fingerprint
    from nemo_minitron.pruning.depth import choose_layers, influence_costs

    before = checkpoint.shape.num_layers
    if config.layers_to_drop is not None or config.method == "random" or num_layers == before:
        return config.layers_to_drop
    if config.depth_scores is not None:
        measured = DepthScores.load(config.depth_scores)
        measured.check(checkpoint.shape, fingerprint(checkpoint), where=config.depth_scores)
        costs = measured.costs(config.depth.criterion)
    elif scores is not None:
        costs = influence_costs(scores.layers.tolist())
    else:
        return None
    kept = choose_layers(costs, before, before - num_layers, config.depth.form)
    return [layer for layer in range(before) if layer not in kept]


def _scores(config: PruneConfig, checkpoint: Any) -> Scores | None:
    """The scores, where the method reads them; they must be those of this checkpoint."""
    from nemo_minitron.importance import Scores, fingerprint

    if config.method == "random" or config.scores is None:
        return None
    scores = Scores.load(config.scores)
    scores.check(checkpoint.shape, fingerprint(checkpoint), where=config.scores)
    return scores


def _lineage(config: PruneConfig, scores: Scores | None) -> dict[str, Any]:
    """How the units were chosen, for ``minitron.json``."""
    if config.method == "random":
        return {"method": config.method, "seed": config.runtime.seed}
    depth = {"criterion": config.depth.criterion, "form": config.depth.form, "scores": config.depth_scores}
    found = {
        "method": config.method,
        "depth": {"layers_to_drop": config.layers_to_drop} if config.layers_to_drop is not None else depth,
    }
    if scores is not None:
        aggregation = {"sequence": scores.sequence, "batch": scores.batch}
        found |= {"scores": config.scores, "samples": scores.samples, "aggregation": aggregation}
    return found
