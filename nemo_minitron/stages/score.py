"""``minitron score``: how much each unit of a model matters, by activations, gradients or weights."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from nemo_minitron import axes
from nemo_minitron.checkpoints.record import peek_family, peek_shape
from nemo_minitron.config import ScoreConfig
from nemo_minitron.jobs.atomic import stage_output
from nemo_minitron.jobs.plans import PlannedPath, StagePlan, human_bytes, human_count
from nemo_minitron.runtime.progress import progress_bar
from nemo_minitron.shape import uniform_faults
from nemo_minitron.stages.shared.checkpoints import model_costs

if TYPE_CHECKING:
    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.importance import Scores

__all__ = ["plan", "run"]

logger = logging.getLogger(__name__)


def plan(config: ScoreConfig) -> StagePlan:
    """What :func:`run` would read, write and cost."""
    from nemo_minitron.data.inputs import data_inputs

    data, layout, shape = data_inputs(config.data), config.parallel, peek_shape(config.model)
    tokens = config.samples * config.data.sequence_length
    found = StagePlan(
        "score", reads=[PlannedPath(config.model, "model")], writes=[PlannedPath(config.output, "scores")]
    )
    if shape is not None:
        found.faults += uniform_faults(shape, "scoring")
    if config.estimator == "magnitude":
        found.notes.append("reads one tensor at a time; no text, no forward pass")
        if shape is not None:
            found.costs.update(model_costs(config.model, config.runtime.dtype))
        return found
    found.reads += [PlannedPath(path, what) for path, what in data.files]
    found.costs["calibration"] = f"{tokens:,} tokens in {config.samples:,} samples"
    found.notes += data.notes
    found.faults += data.faults
    found.faults += layout.sequence_faults(config.data.sequence_length)
    if shape is not None:
        found.faults += shape.layout_faults(tensor=layout.tensor, pipeline=layout.stages)
        found.costs.update(model_costs(config.model, config.runtime.dtype))
        count = axes.parameter_count(peek_family(config.model), shape)
        size = 2 if config.runtime.dtype == "bfloat16" else 4
        # Two operations for each weight and token, and as many for the gradient of each activation; attention scores
        # are small beside it at these lengths.
        passes = 2 if config.estimator == "taylor" else 1
        found.costs["FLOPs"] = human_count(2 * passes * count * tokens)
        found.costs["memory of a rank"] = f"about {human_bytes(count * size / (layout.tensor * layout.pipeline))}"
    return found


def run(config: ScoreConfig) -> dict[str, Any]:
    """Score the model; rank 0 writes ``scores.safetensors`` and ``scores.json``, and those of ``also`` below them.

    Returns:
        ``estimator, samples, tokens, seconds, tokens_per_second, aggregation, criteria, layers`` (the layers' scores).

    Raises:
        MinitronError: for a checkpoint or text that cannot be used, or an activation that is not finite.
    """
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.importance import save_criteria

    checkpoint = open_checkpoint(config.model)
    started = time.monotonic()
    found, is_main = (_by_magnitude if config.estimator == "magnitude" else _by_passes)(config, checkpoint)
    seconds = time.monotonic() - started
    scores = found[0]
    if is_main:
        with stage_output(config.output, config.overwrite) as output:
            save_criteria(found, output)
        logger.info("scored %s tokens in %.1f s (%.0f/s)", f"{scores.tokens:,}", seconds, scores.tokens / seconds)
    return {
        "estimator": scores.estimator,
        "samples": scores.samples,
        "tokens": scores.tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(scores.tokens / seconds, 1),
        "aggregation": {"sequence": scores.sequence, "batch": scores.batch},
        "criteria": [f"{one.sequence}-{one.batch}" for one in found],
        "layers": [round(value, 6) for value in scores.layers.tolist()],
    }


def _by_passes(config: ScoreConfig, checkpoint: Checkpoint) -> tuple[list[Scores], bool]:
    """Scores of every criterion from the running model, and whether this rank is the one that writes."""
    import torch

    from nemo_minitron.checkpoints import load_into
    from nemo_minitron.data import build_blocks
    from nemo_minitron.importance import fingerprint, score_criteria
    from nemo_minitron.runtime.groups import initialize
    from nemo_minitron.runtime.model import build_model

    groups = initialize(
        config.parallel, seed=config.runtime.seed, timeout_minutes=config.runtime.collective_timeout_minutes
    )
    shape = checkpoint.shape
    blocks = build_blocks(
        config.data,
        checkpoint.tokenizer,
        "calibration",
        blocks=config.samples,
        vocab_size=shape.vocab_size,
        max_length=checkpoint.architecture.max_position_embeddings,
    )
    chunks = build_model(shape, checkpoint.architecture, groups, dtype=getattr(torch, config.runtime.dtype))
    load_into(chunks, checkpoint, groups)
    with progress_bar("scoring", len(blocks), shown=groups.is_main) as advance:
        scores = score_criteria(
            chunks,
            blocks,
            groups,
            criteria=config.criteria(),
            shape=shape,
            micro_batch_size=config.micro_batch_size,
            estimator=config.estimator,
            fingerprint=fingerprint(checkpoint),
            progress=advance,
        )
    return scores, groups.is_main


def _by_magnitude(config: ScoreConfig, checkpoint: Checkpoint) -> tuple[list[Scores], bool]:
    """Scores from the weights, in the one process there is."""
    from nemo_minitron.importance import fingerprint, magnitude_scores

    with progress_bar("scoring", len(checkpoint.weights.names())) as advance:
        return [magnitude_scores(checkpoint, fingerprint=fingerprint(checkpoint), progress=advance)], True
