"""``minitron score``: the importance of each unit of a model, by activations, gradients or weights."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from nemo_minitron import axes
from nemo_minitron.checkpoints.model_record import peek_architecture, peek_family, peek_shape
from nemo_minitron.config import ScoreConfig
from nemo_minitron.importance.estimators import ESTIMATORS
from nemo_minitron.jobs.atomic import stage_output
from nemo_minitron.jobs.plans import DiskNeed, PlannedPath, StagePlan, human_bytes, human_count
from nemo_minitron.planning import HOST_FLOAT64
from nemo_minitron.runtime.progress import progress_bar
from nemo_minitron.shape import uniform_faults
from nemo_minitron.stages.shared.checkpoints import model_costs
from nemo_minitron.stages.shared.disk import block_needs
from nemo_minitron.stages.shared.measuring import Measured, live_model, open_measured, plan_measuring
from nemo_minitron.stages.shared.memory import weights_of_rank
from nemo_minitron.stages.shared.streaming import plan_streaming, state_budget, streamed_model, streams, trail

if TYPE_CHECKING:
    from nemo_minitron.importance import Scores
    from nemo_minitron.shape import ModelShape

__all__ = ["plan", "run"]

logger = logging.getLogger(__name__)


def plan(config: ScoreConfig) -> StagePlan:
    """What :func:`run` would read, write and cost."""
    layout, shape = config.parallel, peek_shape(config.model)
    written = PlannedPath(config.output, "scores")
    faults = [] if shape is None else uniform_faults(shape, "scoring")
    if not config.runs_model:
        plan = StagePlan("score", reads=[PlannedPath(config.model, "model")], writes=[written], faults=faults)
        plan.notes.append("reads one tensor at a time; no text, no forward pass")
        plan.costs.update(model_costs(config.model, config.runtime.dtype))
        plan.disk += _needs(config, shape)
        return plan
    plan = plan_measuring(config, "score", written)
    plan.faults += faults
    plan.disk += [*_needs(config, shape), *block_needs(config.data, config.samples)]
    if shape is not None:
        plan.faults += shape.layout_faults(tensor=layout.tensor, pipeline=layout.pipeline_stages, expert=layout.expert)
        plan.costs.update(model_costs(config.model, config.runtime.dtype))
        count = axes.parameter_count(peek_family(config.model), shape)
        # Two operations for each weight and token, and as many for the gradient of each activation; attention scores
        # are small beside it at these lengths.
        estimator, tokens = ESTIMATORS[config.estimator], float(config.samples * config.data.sequence_length)
        plan.flops = 2.0 * estimator.passes * count * tokens
        if shape.uniform and estimator.work is not None:
            constants = peek_architecture(config.model)
            used = 1 if constants is None else constants.moe_router_topk or 1
            plan.flops += HOST_FLOAT64 * estimator.work(shape, tokens, used)
        plan.costs["FLOPs"] = human_count(plan.flops)
        plan.costs["memory of a rank"] = weights_of_rank(config, config.model)
        if shape.uniform and (sums := _sums(config, shape)):
            plan.costs["sums of all layers"] = (
                f"{human_bytes(sums)} over all ranks of a model, beside its weights; with memory=streamed "
                f"{human_bytes(sums / shape.num_layers)}"
            )
    plan_streaming(plan, config, config.model)
    return plan


def _needs(config: ScoreConfig, shape: ModelShape | None) -> list[DiskNeed]:
    """Eight bytes a unit, for each pair of aggregations."""
    if shape is None or not shape.uniform:
        return []
    units = shape.ffn_hidden_size * (shape.num_moe_experts or 1) + shape.num_attention_heads + shape.num_query_groups
    units += (shape.num_moe_experts or 0) + 1
    each = 8.0 * (shape.num_layers * units + shape.hidden_size)
    return [DiskNeed("scores", config.output, each * (1 + len(config.also)))]


def _sums(config: ScoreConfig, shape: ModelShape) -> int:
    """Bytes that the estimator keeps of all layers of a live model."""
    of_layer = ESTIMATORS[config.estimator].sums
    return 0 if of_layer is None else shape.num_layers * of_layer(shape)


def run(config: ScoreConfig) -> dict[str, Any]:
    """Score the model; rank 0 writes ``scores.safetensors`` and ``scores.json``, those of ``also`` in subdirectories.

    Returns:
        ``estimator, samples, tokens, seconds, tokens_per_second, aggregation, criteria, layers`` (the layers' scores).

    Raises:
        MinitronError: for a checkpoint or text that cannot be used, or an activation that is not finite.
    """
    from nemo_minitron.importance import save_criteria

    started = time.monotonic()
    result, is_main = (_by_passes if config.runs_model else _by_weights)(config)
    seconds = time.monotonic() - started
    scores = result[0]
    if is_main:
        with stage_output(config.output, config.overwrite) as output:
            save_criteria(result, output)
        logger.info("scored %s tokens in %.1f s (%.0f/s)", f"{scores.tokens:,}", seconds, scores.tokens / seconds)
    return {
        "estimator": scores.estimator,
        "samples": scores.samples,
        "tokens": scores.tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(scores.tokens / seconds, 1),
        "aggregation": {"sequence": scores.sequence, "batch": scores.batch},
        "criteria": [f"{kind.sequence}-{kind.batch}" for kind in result],
        "layers": [round(value, 6) for value in scores.layers.tolist()],
    }


def _by_passes(config: ScoreConfig) -> tuple[list[Scores], bool]:
    """Scores of every criterion from the running model, and whether this rank writes."""
    from nemo_minitron.importance import fingerprint, score_criteria

    measured = open_measured(config)
    checkpoint, groups = measured.checkpoint, measured.groups
    beside = _sums(config, checkpoint.shape)
    if not ESTIMATORS[config.estimator].gradients and streams(config, checkpoint, groups, beside=beside):
        return _by_streamed_pass(config, measured), groups.is_main
    chunks = live_model(config, checkpoint, groups)
    with progress_bar("scoring", len(measured.blocks), shown=groups.is_main) as advance:
        scores = score_criteria(
            chunks,
            measured.blocks,
            groups,
            criteria=config.criteria(),
            shape=checkpoint.shape,
            micro_batch_size=config.micro_batch_size,
            estimator=config.estimator,
            fingerprint=fingerprint(checkpoint),
            loss=config.taylor.loss,
            progress=advance,
        )
    return scores, groups.is_main


def _by_streamed_pass(config: ScoreConfig, measured: Measured) -> list[Scores]:
    """Scores of every criterion from a pass layer by layer; if it is killed, a later process goes on with it."""
    from nemo_minitron.importance import fingerprint
    from nemo_minitron.importance.streamed import score_streamed

    checkpoint, groups, blocks = measured.checkpoint, measured.groups, measured.blocks
    weights = fingerprint(checkpoint)
    subject = {
        "fingerprint": weights,
        "blocks": blocks.content()[:32],
        "criteria": config.criteria(),
        "estimator": config.estimator,
        "dtype": config.runtime.dtype,
        "micro_batch_size": config.micro_batch_size,
    }
    kept = trail(config, groups, subject)
    with progress_bar("scoring layer by layer", checkpoint.shape.num_layers, shown=groups.is_main) as advance:
        scores = score_streamed(
            streamed_model(config, checkpoint, groups),
            blocks,
            criteria=config.criteria(),
            micro_batch_size=config.micro_batch_size,
            estimator=config.estimator,
            fingerprint=weights,
            budget=state_budget(config),
            trail=kept,
            progress=advance,
        )
    kept.close()
    return scores


def _by_weights(config: ScoreConfig) -> tuple[list[Scores], bool]:
    """Scores from the weights, in a single process."""
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.importance import fingerprint

    checkpoint = open_checkpoint(config.model)
    score = ESTIMATORS[config.estimator].from_weights
    assert score is not None, "else it runs the model"
    with progress_bar("scoring", len(checkpoint.weights.names())) as advance:
        return [score(checkpoint, fingerprint=fingerprint(checkpoint), progress=advance)], True
