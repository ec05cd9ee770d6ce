"""``minitron prune``: remove the least important units from a checkpoint. One process, one tensor at a time."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron import axes
from nemo_minitron.config import PruneConfig
from nemo_minitron.errors import ShapeError
from nemo_minitron.jobs.plans import PlannedPath, StagePlan, human_count
from nemo_minitron.pruning.kept import kept_path
from nemo_minitron.runtime.progress import progress_bar
from nemo_minitron.stages.shared.checkpoints import format_faults, staged_checkpoint, written_faults
from nemo_minitron.stages.shared.choosing import kept_units, read_scores
from nemo_minitron.stages.shared.disk import readable_model
from nemo_minitron.stages.shared.pruned import plan_pruned
from nemo_minitron.stages.shared.target import plan_target, target_lineage, target_sizes

if TYPE_CHECKING:
    from nemo_minitron.axes import KeptUnits
    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.importance import Scores
    from nemo_minitron.shape import ModelShape

__all__ = ["plan", "run"]

logger = logging.getLogger(__name__)


def plan(config: PruneConfig) -> StagePlan:
    """What :func:`run` would read, write and cost."""
    from nemo_minitron.pruning.choose import target_shape

    plan = StagePlan(
        "prune",
        reads=[PlannedPath(config.model, "model")],
        writes=[PlannedPath(config.output, f"pruned model ({config.format})")],
        faults=format_faults(config.output, config.format),
    )
    if config.method != "random" and config.scores is not None:
        plan.reads.append(PlannedPath(config.scores, "scores"))
    if config.vocabulary.frequencies is not None:
        plan.reads.append(PlannedPath(config.vocabulary.frequencies, "token frequencies"))
    if config.depth_scores is not None:
        plan.reads.append(PlannedPath(config.depth_scores, "depth scores"))
    plan.makes[config.output] = None
    model, sizes = readable_model(config.model), plan_target(plan, config.target)
    if sizes is None:
        plan.costs["target"] = "the shape that the search chooses"
    if model is not None and sizes is not None:
        shape = model.shape
        try:
            target = target_shape(shape, _sizes(config, sizes), layers_to_drop=config.layers_to_drop)
        except ShapeError as error:
            plan.faults += error.faults
        else:
            plan.faults += _layout_faults(config, target)
            plan.faults += written_faults(target, model.architecture, [config.format])
            plan_pruned(plan, config, model, target)
    plan.notes.append("reads and writes one tensor at a time; no forward pass")
    return plan


def run(config: PruneConfig) -> dict[str, Any]:
    """Prune the checkpoint, and record the kept units in ``kept.json``.

    Returns:
        ``method, parameters_before, parameters, share, shape, layers`` (the kept ones).

    Raises:
        MinitronError: for a checkpoint or scores that cannot be used, or a target that cannot be reached.
    """
    from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
    from nemo_minitron.pruning import merge_pruned_heads, prune_weights, save_kept, target_shape

    checkpoint = open_checkpoint(config.model)
    sizes = _sizes(config, target_sizes(config.target))
    target = target_shape(checkpoint.shape, sizes, layers_to_drop=config.layers_to_drop)
    if faults := _layout_faults(config, target) + written_faults(target, checkpoint.architecture, [config.format]):
        raise ShapeError(faults)
    scores = read_scores(config, checkpoint)
    kept = kept_units(config, checkpoint, target, scores)
    source = checkpoint
    if config.merge_pruned_heads and scores is not None:
        source = merge_pruned_heads(checkpoint, kept, scores.heads)
    pruned = prune_weights(source, kept, lineage=_lineage(config, scores))
    with (
        _trimmed(pruned, checkpoint, kept) as pruned,
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


def _sizes(config: PruneConfig, sizes: dict[str, int]) -> dict[str, int]:
    """The sizes of the target, with that of the vocabulary."""
    vocabulary = {} if config.vocabulary.size is None else {"vocab_size": config.vocabulary.size}
    return sizes | vocabulary


def _layout_faults(config: PruneConfig, target: ModelShape) -> list[str]:
    layout = config.student_layout
    faults = target.layout_faults(tensor=layout.tensor, pipeline=layout.pipeline_stages)
    return [f"student_layout: {fault}" for fault in faults]


@contextmanager
def _trimmed(pruned: Checkpoint, checkpoint: Checkpoint, kept: KeptUnits) -> Iterator[Checkpoint]:
    """The pruned checkpoint with its tokenizer, trimmed where the vocabulary is."""
    from nemo_minitron.checkpoints.tokenizer.trimming import trim_tokenizer

    if kept.vocab is None or checkpoint.tokenizer is None:
        yield pruned
        return
    with tempfile.TemporaryDirectory() as scratch:
        trim_tokenizer(checkpoint.tokenizer, kept.vocab, Path(scratch) / "tokenizer")
        yield dataclasses.replace(pruned, tokenizer=Path(scratch) / "tokenizer")


def _lineage(config: PruneConfig, scores: Scores | None) -> dict[str, Any]:
    """How the units were chosen, for ``minitron.json``."""
    vocabulary = {} if config.vocabulary.size is None else {"vocabulary": dataclasses.asdict(config.vocabulary)}
    if config.method == "random":
        drop = {} if config.layers_to_drop is None else {"depth": {"layers_to_drop": config.layers_to_drop}}
        drawn = {"method": config.method, "seed": config.runtime.seed}
        return drawn | drop | vocabulary | target_lineage(config.target)
    depth = {"criterion": config.depth.criterion, "form": config.depth.form, "scores": config.depth_scores}
    lineage: dict[str, Any] = (
        {
            "method": config.method,
            "depth": {"layers_to_drop": config.layers_to_drop} if config.layers_to_drop is not None else depth,
        }
        | vocabulary
        | target_lineage(config.target)
    )
    if scores is not None:
        aggregation = {"sequence": scores.sequence, "batch": scores.batch}
        lineage |= {"merge_pruned_heads": config.merge_pruned_heads}
        lineage |= {"scores": config.scores, "samples": scores.samples, "aggregation": aggregation}
    return lineage
