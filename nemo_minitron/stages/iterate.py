"""``minitron iterate``: score, prune, score again: a target reached in several rounds, without training in between."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron import axes
from nemo_minitron.checkpoints.model_record import peek_family, peek_shape
from nemo_minitron.config import IterateConfig, TaylorConfig
from nemo_minitron.errors import CheckpointError, ShapeError
from nemo_minitron.importance.estimators import ESTIMATORS
from nemo_minitron.jobs.plans import PlannedPath, StagePlan, human_count
from nemo_minitron.pruning.kept import kept_path
from nemo_minitron.runtime.progress import progress_bar
from nemo_minitron.shape import require_uniform
from nemo_minitron.stages.shared.checkpoints import format_faults, staged_checkpoint
from nemo_minitron.stages.shared.measuring import live_model, open_measured, plan_measuring
from nemo_minitron.stages.shared.memory import planned_model
from nemo_minitron.stages.shared.pruned import plan_pruned
from nemo_minitron.stages.shared.target import plan_target, target_lineage, target_sizes

if TYPE_CHECKING:
    from nemo_minitron.axes import KeptUnits
    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.data import Blocks
    from nemo_minitron.runtime.groups import Groups
    from nemo_minitron.shape import ModelShape

__all__ = ["plan", "run"]

logger = logging.getLogger(__name__)


def plan(config: IterateConfig) -> StagePlan:
    """What :func:`run` would read, write and cost."""
    shape = peek_shape(config.model)
    written = PlannedPath(config.output, f"pruned model ({config.format})")
    plan = plan_measuring(config, "iterate", written, repeated=", in each round")
    plan.faults += format_faults(config.output, config.format)
    if done := len(list(_rounds_folder(config).glob("round-*.json"))):
        plan.notes.append(f"goes on after round {done} of {config.rounds}, if model, text and settings are the same")
    plan.makes[config.output] = None
    sizes = plan_target(plan, config.target)
    if sizes is None:
        plan.costs["target"] = "the shape that the search chooses"
    if shape is None or sizes is None:
        return plan
    try:
        shapes = _shapes(config, shape, sizes)
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
    from nemo_minitron.importance import fingerprint
    from nemo_minitron.pruning import choose_units, prune_weights

    started = time.monotonic()
    measured = open_measured(config)
    checkpoint, groups, blocks = measured.checkpoint, measured.groups, measured.blocks
    shape = checkpoint.shape
    shapes = _shapes(config, shape, target_sizes(config.target))
    journal = _Rounds(_rounds_folder(config), _subject(config, fingerprint(checkpoint), blocks, shapes), groups)
    kept, done = journal.resume(shape)
    for number, target in enumerate(shapes[done:], done + 1):
        now = checkpoint if kept is None else prune_weights(checkpoint, kept)
        scores = _score(config, now, blocks, groups, f"round {number} of {len(shapes)}")
        # Every rank has all scores, and chooses alike.
        chosen = choose_units(scores, now.shape, target, method=config.estimator)
        kept = chosen if kept is None else kept.compose(chosen)
        journal.add(number, kept, shape)
    assert kept is not None, "there is at least one round"
    before, after = (axes.parameter_count(checkpoint.family, step) for step in (shape, shapes[-1]))
    if groups.is_main:
        _write(config, checkpoint, kept, shapes)
        journal.clear()
        logger.info("%s -> %s parameters in %d rounds", human_count(before), human_count(after), len(shapes))
    return {
        "rounds": [step.to_dict() for step in shapes],
        "resumed": done,
        "parameters_before": before,
        "parameters": after,
        "share": round(after / before, 6),
        "shape": shapes[-1].to_dict(),
        "layers": list(kept.layers),
        "seconds": round(time.monotonic() - started, 3),
    }


def _shapes(config: IterateConfig, shape: ModelShape, sizes: dict[str, int]) -> list[ModelShape]:
    from nemo_minitron.pruning.choose import target_shape
    from nemo_minitron.pruning.rounds import intermediate_shapes

    require_uniform(shape, "pruning in rounds")
    layout = config.parallel
    return intermediate_shapes(
        shape,
        target_shape(shape, sizes),
        config.rounds,
        spacing=config.spacing,
        tensor=layout.tensor,
        pipeline=layout.pipeline_stages,
    )


def _score(config: IterateConfig, checkpoint: Checkpoint, blocks: Blocks, groups: Groups, label: str) -> Any:
    from nemo_minitron.importance import score_model

    chunks = live_model(config, checkpoint, groups)
    with progress_bar(label, len(blocks), shown=groups.is_main) as advance:
        return score_model(
            chunks,
            blocks,
            groups,
            shape=checkpoint.shape,
            micro_batch_size=config.micro_batch_size,
            sequence=config.aggregation.sequence,
            batch=config.aggregation.batch,
            estimator=config.estimator,
            loss=config.taylor.loss,
            progress=advance,
        )


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


def _rounds_folder(config: IterateConfig) -> Path:
    output = Path(config.output).absolute()
    return output.with_name(f".{output.name}.rounds")


def _subject(config: IterateConfig, weights: str, blocks: Blocks, shapes: list[ModelShape]) -> str:
    """Everything that the rounds depend on, without the layout; rounds with other values are not used."""
    settings = {
        "weights": weights,
        "tokens": blocks.content(),
        "estimator": config.estimator,
        "aggregation": vars(config.aggregation),
        "shapes": [step.to_dict() for step in shapes],
        **({} if config.taylor == TaylorConfig() else {"taylor": vars(config.taylor)}),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


class _Rounds:
    """The kept units after each finished round, in a directory beside the output until the output exists."""

    def __init__(self, folder: Path, subject: str, groups: Groups) -> None:
        self.folder = folder
        self.subject = subject
        self.groups = groups

    def resume(self, shape: ModelShape) -> tuple[KeptUnits | None, int]:
        """The units after the last finished round, and how many rounds are finished. Collective."""
        import torch.distributed as dist

        from nemo_minitron.pruning import load_kept

        kept, done = None, 0
        marker = self.folder / "subject"
        if marker.is_file() and marker.read_text() == self.subject:
            while (self.folder / f"round-{done + 1}.json").is_file():
                try:
                    kept, of = load_kept(self.folder / f"round-{done + 1}.json")
                except CheckpointError:
                    break
                assert of == shape, "the subject holds the weights' fingerprint"
                done += 1
        # Nobody writes before everybody has read.
        dist.barrier()
        if self.groups.is_main and not done:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            marker.write_text(self.subject)
        return kept, done

    def add(self, number: int, kept: KeptUnits, shape: ModelShape) -> None:
        """Save a round's result."""
        from nemo_minitron.pruning import save_kept

        if self.groups.is_main:
            save_kept(kept, shape, self.folder / f"round-{number}.json")

    def clear(self) -> None:
        """Remove the saved rounds: the output is written."""
        shutil.rmtree(self.folder, ignore_errors=True)
