"""``minitron depth``: what a model loses without some of its layers, by loss and by a task."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nemo_minitron import axes
from nemo_minitron.checkpoints.model_record import peek_family, peek_shape
from nemo_minitron.config import DepthConfig
from nemo_minitron.config.parts import parse_bytes
from nemo_minitron.importance.candidates import Candidate, depth_faults, layers_run, rounds
from nemo_minitron.importance.depth_scores import depth_journal
from nemo_minitron.jobs.atomic import stage_output
from nemo_minitron.jobs.plans import DiskNeed, PlannedPath, StagePlan, human_bytes, human_count
from nemo_minitron.runtime.journal import Journal
from nemo_minitron.runtime.progress import progress_bar
from nemo_minitron.shape import ModelShape, uniform_faults
from nemo_minitron.stages.shared.checkpoints import model_costs
from nemo_minitron.stages.shared.measuring import Measured, encoded_task, live_model, open_measured, plan_measuring
from nemo_minitron.stages.shared.memory import weights_of_rank
from nemo_minitron.stages.shared.streaming import plan_streaming, state_budget, streamed_model, streams, trail

if TYPE_CHECKING:
    from nemo_minitron.axes import Family
    from nemo_minitron.data import Blocks
    from nemo_minitron.data.tasks import Question
    from nemo_minitron.importance import DepthScores
    from nemo_minitron.streamed import Trail

__all__ = ["plan", "run"]

logger = logging.getLogger(__name__)


def plan(config: DepthConfig) -> StagePlan:
    """What :func:`run` would read, write and cost, and how many results exist already."""
    layout, shape = config.parallel, peek_shape(config.model)
    plan = plan_measuring(config, "depth", PlannedPath(config.output, "depth scores"), repeated=", for each candidate")
    if config.task.path is not None:
        plan.reads.append(PlannedPath(config.task.path, "task"))
    if config.task.given is not None:
        plan.notes.append("FLOPs are those of the loss; the task adds its own, by the tokens of its choices")
    if shape is None:
        return plan
    faults = uniform_faults(shape, "measuring depth")
    faults += depth_faults(shape.num_layers, config.block_lengths, config.greedy)
    plan.faults += faults + shape.layout_faults(tensor=layout.tensor, pipeline=layout.pipeline_stages)
    plan.costs.update(model_costs(config.model, config.runtime.dtype))
    if faults:
        return plan
    family = peek_family(config.model)
    known, greedy = _candidates(config, shape)
    done = max(0, Journal.entries(Journal.beside(config.output)) - 1)  # without the whole model
    plan.costs["candidates"] = f"{len(known) - 1 + sum(greedy):,}" + (f", {done:,} measured already" if done else "")
    plan.flops = _flops(config, shape, family)
    plan.costs["FLOPs"] = human_count(plan.flops)
    plan.costs["memory of a rank"] = weights_of_rank(config, config.model)
    size = 2 if config.runtime.dtype == "bfloat16" else 4
    states = config.samples * config.data.sequence_length * shape.hidden_size * size / layout.data
    if config.memory == "streamed":
        plan_streaming(plan, config, config.model)
        largest = max(len(known), *greedy, 1) * states
        plan.costs["hidden states kept"] = f"{human_bytes(largest)} of all candidates, without those of the task"
        if (more := layout.data * (largest - parse_bytes(config.states_memory))) > 0:
            plan.disk.append(DiskNeed("hidden states", config.output, more, stay=0.0))
    elif config.reuse_prefix:
        plan.costs["hidden states kept"] = f"{human_bytes(states)} on the host of a pipeline stage"
    return plan


def _candidates(config: DepthConfig, shape: ModelShape) -> tuple[list[Candidate], list[int]]:
    """The candidates known beforehand, the whole model first, and how many each greedy round adds.

    Greedy rounds may need fewer, because a block that is measured already is not measured again.
    """
    known = [
        layers
        for part in rounds(shape.num_layers, single=config.single, block_lengths=config.block_lengths)
        for layers in part
    ]
    return known, [shape.num_layers - gone for gone in range(1 if config.single else 0, config.greedy)]


def _flops(config: DepthConfig, shape: ModelShape, family: Family) -> float:
    """Operations for the loss of all candidates of a model whose layers are all alike: two for each weight and token.

    Attention scores are small in comparison at these lengths. For greedy rounds, shared prefixes are not deducted.
    """
    known, greedy = _candidates(config, shape)
    if config.reuse_prefix:
        layers = layers_run(shape.num_layers, known)
    else:
        layers = sum(shape.num_layers - len(layers_left_out) for layers_left_out in known)
    layers += sum(count * (count - 1) for count in greedy)
    head = shape.vocab_size * shape.hidden_size
    weights = axes.layer_count(family, shape) * layers + head * (len(known) + sum(greedy))
    return 2.0 * weights * config.samples * config.data.sequence_length


def run(config: DepthConfig) -> dict[str, Any]:
    """Measure the model; rank 0 adds each result to a journal beside the output, and writes ``depth.json`` at the end.

    Returns:
        ``tokens, candidates, resumed, task, questions, baseline, single, seconds``; ``single`` holds the loss increase
        of each layer, by its number, where layers were measured alone.

    Raises:
        MinitronError: for a checkpoint, text or task that cannot be used, or a loss that is not finite.
    """
    from nemo_minitron.importance import fingerprint

    started = time.monotonic()
    measured = open_measured(config)
    checkpoint, groups, blocks = measured.checkpoint, measured.groups, measured.blocks
    questions, task = encoded_task(config, checkpoint)
    weights = fingerprint(checkpoint)
    subject = _subject(config, weights, blocks, questions)
    journal = depth_journal(Journal.beside(config.output), subject)
    options: dict[str, Any] = {
        "micro_batch_size": config.micro_batch_size,
        "single": config.single,
        "block_lengths": config.block_lengths,
        "greedy": config.greedy,
        "greedy_by": config.greedy_by,
        "task": task,
        "task_name": config.task.given or "",
        "fingerprint": weights,
        "journal": journal,
    }
    if streams(config, checkpoint, groups):
        scores = _streamed(config, measured, subject, options)
    else:
        scores = _live(config, measured, options)
    if groups.is_main:
        with stage_output(config.output, config.overwrite) as output:
            scores.save(output)
        journal.close()
        logger.info("%d candidates on %s tokens each", len(scores.measured) - 1, f"{scores.tokens:,}")
    baseline = scores.measured[()]
    increase = {layers[0]: cost for layers, (cost,) in scores.costs("loss").items() if len(layers) == 1}
    return {
        "tokens": scores.tokens,
        "candidates": len(scores.measured) - 1,
        "resumed": max(0, journal.resumed - 1),  # without the whole model
        "task": scores.task,
        "questions": scores.questions,
        "baseline": {"loss": round(baseline.loss, 6), "accuracy": baseline.accuracy},
        "single": {str(layer): round(cost, 6) for layer, cost in sorted(increase.items())},
        "seconds": round(time.monotonic() - started, 3),
    }


def _live(config: DepthConfig, measured: Measured, options: dict[str, Any]) -> DepthScores:
    """By the whole model in memory, candidate by candidate."""
    from nemo_minitron.importance import layer_importance

    checkpoint, groups = measured.checkpoint, measured.groups
    chunks = live_model(config, checkpoint, groups)
    known, greedy = _candidates(config, checkpoint.shape)
    with progress_bar("depth", len(known) - 1 + sum(greedy), shown=groups.is_main) as advance:
        return layer_importance(
            chunks,
            measured.blocks,
            groups,
            shape=checkpoint.shape,
            reuse_prefix=config.reuse_prefix,
            progress=advance,
            **options,
        )


def _streamed(config: DepthConfig, measured: Measured, subject: dict[str, Any], options: dict[str, Any]) -> DepthScores:
    """By one layer in memory at a time; a pass that is killed goes on at its layer."""
    from nemo_minitron.importance.depth_streamed import layer_importance_streamed

    checkpoint, groups = measured.checkpoint, measured.groups
    known, greedy = _candidates(config, checkpoint.shape)
    passes = (1 if len(known) > 1 or not greedy else 0) + len(greedy)

    def kept(candidates: Sequence[Candidate]) -> Trail:
        return trail(
            config, groups, {**subject, "micro_batch_size": config.micro_batch_size, "candidates": list(candidates)}
        )

    total = passes * (checkpoint.shape.num_layers + 1)
    with progress_bar("depth, layer by layer", total, shown=groups.is_main) as advance:
        scores = layer_importance_streamed(
            streamed_model(config, checkpoint, groups),
            measured.blocks,
            budget=state_budget(config),
            trail=kept,
            progress=advance,
            **options,
        )
    kept([]).close()  # of a process that was killed between a pass and its end
    return scores


def _subject(config: DepthConfig, weights: str, blocks: Blocks, questions: list[Question]) -> dict[str, Any]:
    """Everything that a result depends on, without the layout; a journal with other values is not used."""
    task = json.dumps([[question.prompt, question.choices, question.answer] for question in questions])
    return {
        "fingerprint": weights,
        "blocks": blocks.content()[:32],
        "task": hashlib.sha256(task.encode()).hexdigest()[:32] if questions else None,
        "dtype": config.runtime.dtype,
    }
