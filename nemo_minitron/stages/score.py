"""``minitron score``: how much each unit of a model matters, by forward passes over calibration text."""

from __future__ import annotations

import logging
import time
from typing import Any

from nemo_minitron import axes
from nemo_minitron.config import ScoreConfig
from nemo_minitron.runtime.progress import progress_bar
from nemo_minitron.stages.base import PlannedPath, StagePlan, human_bytes, human_count, peek_shape, stage_output
from nemo_minitron.stages.conversion import model_costs

__all__ = ["plan", "run"]

logger = logging.getLogger(__name__)


def plan(config: ScoreConfig) -> StagePlan:
    """What :func:`run` would read, write and cost."""
    from nemo_minitron.data.inputs import data_inputs

    data, layout, shape = data_inputs(config.data), config.parallel, peek_shape(config.model)
    tokens = config.samples * config.data.sequence_length
    found = StagePlan(
        "score",
        reads=[PlannedPath(config.model, "model"), *(PlannedPath(path, what) for path, what in data.files)],
        writes=[PlannedPath(config.output, "scores")],
        costs={"calibration": f"{tokens:,} tokens in {config.samples:,} samples"},
        notes=data.notes,
        faults=data.faults,
    )
    if config.data.sequence_length % layout.tensor and layout.sequence_parallel:
        found.faults.append(
            f"data.sequence_length={config.data.sequence_length}: cannot be split over "
            f"parallel.tensor={layout.tensor}; set a multiple of it, or parallel.sequence_parallel=false"
        )
    if shape is not None:
        stages = layout.pipeline * (layout.virtual_pipeline or 1)
        found.faults += shape.layout_faults(tensor=layout.tensor, pipeline=stages)
        found.costs.update(model_costs(shape, config.runtime.dtype))
        count = axes.parameter_count(axes.family("llama"), shape)
        size = 2 if config.runtime.dtype == "bfloat16" else 4
        # Two operations for each weight and token; attention scores are small beside it at these lengths.
        found.costs["FLOPs"] = human_count(2 * count * tokens)
        found.costs["memory of a rank"] = f"about {human_bytes(count * size / (layout.tensor * layout.pipeline))}"
    return found


def run(config: ScoreConfig) -> dict[str, Any]:
    """Score the model; rank 0 writes ``scores.safetensors`` and ``scores.json``.

    Returns:
        ``samples, tokens, seconds, tokens_per_second, aggregation, layers`` (block influence of each layer).

    Raises:
        MinitronError: for a checkpoint or text that cannot be used, or an activation that is not finite.
    """
    import torch

    from nemo_minitron.checkpoints import load_into, open_checkpoint
    from nemo_minitron.data import build_blocks
    from nemo_minitron.importance import fingerprint, score_model
    from nemo_minitron.runtime.groups import ParallelLayout, initialize
    from nemo_minitron.runtime.model import build_model

    layout = ParallelLayout(**vars(config.parallel))
    groups = initialize(layout, seed=config.runtime.seed, timeout_minutes=config.runtime.collective_timeout_minutes)
    checkpoint = open_checkpoint(config.model)
    shape = checkpoint.shape
    blocks = build_blocks(
        config.data, checkpoint.tokenizer, "calibration", blocks=config.samples, vocab_size=shape.vocab_size
    )
    chunks = build_model(shape, checkpoint.architecture, groups, dtype=getattr(torch, config.runtime.dtype))
    load_into(chunks, checkpoint, groups)

    started = time.monotonic()
    with progress_bar("scoring", len(blocks), shown=groups.is_main) as advance:
        scores = score_model(
            chunks,
            blocks,
            groups,
            shape=shape,
            micro_batch_size=config.micro_batch_size,
            sequence=config.aggregation.sequence,
            batch=config.aggregation.batch,
            fingerprint=fingerprint(checkpoint),
            progress=advance,
        )
    seconds = time.monotonic() - started

    if groups.is_main:
        with stage_output(config.output, config.overwrite) as output:
            scores.save(output, overwrite=True)
        logger.info("scored %s tokens in %.1f s (%.0f/s)", f"{scores.tokens:,}", seconds, scores.tokens / seconds)
    return {
        "samples": scores.samples,
        "tokens": scores.tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(scores.tokens / seconds, 1),
        "aggregation": {"sequence": scores.sequence, "batch": scores.batch},
        "layers": [round(value, 6) for value in scores.layers.tolist()],
    }
