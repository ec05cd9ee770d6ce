"""``minitron depth``: what a model loses without some of its layers, by loss and by a task."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from typing import TYPE_CHECKING, Any

from nemo_minitron import axes
from nemo_minitron.checkpoints.record import peek_family, peek_shape
from nemo_minitron.config import DepthConfig
from nemo_minitron.importance.candidates import Candidate, depth_faults, layers_run, rounds
from nemo_minitron.importance.depth_scores import depth_journal
from nemo_minitron.jobs.atomic import stage_output
from nemo_minitron.jobs.plans import PlannedPath, StagePlan, human_bytes, human_count
from nemo_minitron.runtime.journal import Journal
from nemo_minitron.runtime.progress import progress_bar
from nemo_minitron.shape import ModelShape, uniform_faults
from nemo_minitron.stages.shared.checkpoints import model_costs

if TYPE_CHECKING:
    from nemo_minitron.axes import Family
    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.data import Blocks
    from nemo_minitron.data.tasks import EncodedTask, Question

__all__ = ["plan", "run"]

logger = logging.getLogger(__name__)


def plan(config: DepthConfig) -> StagePlan:
    """What :func:`run` would read, write and cost, and how much of it is done already."""
    from nemo_minitron.data.inputs import data_inputs

    data, layout, shape = data_inputs(config.data), config.parallel, peek_shape(config.model)
    tokens = config.samples * config.data.sequence_length
    found = StagePlan(
        "depth",
        reads=[PlannedPath(config.model, "model"), *(PlannedPath(path, what) for path, what in data.files)],
        writes=[PlannedPath(config.output, "depth scores")],
        costs={"calibration": f"{tokens:,} tokens in {config.samples:,} samples, for each candidate"},
        notes=data.notes,
        faults=data.faults,
    )
    if config.task.path is not None:
        found.reads.append(PlannedPath(config.task.path, "task"))
    if config.task.given is not None:
        found.notes.append("FLOPs are those of the loss; the task adds its own, by the tokens of its choices")
    found.faults += layout.sequence_faults(config.data.sequence_length)
    if shape is None:
        return found
    faults = uniform_faults(shape, "measuring depth")
    faults += depth_faults(shape.num_layers, config.block_lengths, config.greedy)
    found.faults += faults + shape.layout_faults(tensor=layout.tensor, pipeline=layout.stages)
    found.costs.update(model_costs(config.model, config.runtime.dtype))
    if faults:
        return found
    size = 2 if config.runtime.dtype == "bfloat16" else 4
    family = peek_family(config.model)
    known, greedy = _candidates(config, shape)
    done = max(0, Journal.entries(Journal.beside(config.output)) - 1)  # without the whole model
    found.costs["candidates"] = f"{len(known) - 1 + sum(greedy):,}" + (f", {done:,} measured already" if done else "")
    found.costs["FLOPs"] = human_count(_flops(config, shape, family))
    weights = axes.parameter_count(family, shape) * size / (layout.tensor * layout.pipeline)
    found.costs["memory of a rank"] = f"about {human_bytes(weights)}"
    if config.reuse_prefix:
        states = tokens * shape.hidden_size * size / layout.data
        found.costs["hidden states kept"] = f"{human_bytes(states)} on the host of a pipeline stage"
    return found


def _candidates(config: DepthConfig, shape: ModelShape) -> tuple[list[Candidate], list[int]]:
    """The candidates known beforehand, the whole model first, and how many each greedy round adds to them.

    Greedy rounds may turn out to need less: a block that is measured already counts.
    """
    known = [
        layers
        for part in rounds(shape.num_layers, single=config.single, block_lengths=config.block_lengths)
        for layers in part
    ]
    return known, [shape.num_layers - gone for gone in range(1 if config.single else 0, config.greedy)]


def _flops(config: DepthConfig, shape: ModelShape, family: Family) -> float:
    """Operations for the loss of all candidates of a model whose layers are all alike: two for each weight and token.

    Attention scores are small beside it at these lengths. Greedy rounds are counted without what they share.
    """
    known, greedy = _candidates(config, shape)
    if config.reuse_prefix:
        layers = layers_run(shape.num_layers, known)
    else:
        layers = sum(shape.num_layers - len(one) for one in known)
    layers += sum(count * (count - 1) for count in greedy)
    head = shape.vocab_size * shape.hidden_size
    weights = axes.layer_count(family, shape) * layers + head * (len(known) + sum(greedy))
    return 2.0 * weights * config.samples * config.data.sequence_length


def run(config: DepthConfig) -> dict[str, Any]:
    """Measure the model; rank 0 writes ``depth.json``, and until it is there each result into a journal beside it.

    Returns:
        ``tokens, candidates, resumed, task, questions, baseline, single, seconds``; ``single`` holds the loss increase
        of each layer, by its number, where layers were measured alone.

    Raises:
        MinitronError: for a checkpoint, text or task that cannot be used, or a loss that is not finite.
    """
    import torch

    from nemo_minitron.checkpoints import load_into, open_checkpoint
    from nemo_minitron.data import build_blocks
    from nemo_minitron.importance import fingerprint, layer_importance
    from nemo_minitron.runtime.groups import initialize
    from nemo_minitron.runtime.model import build_model

    started = time.monotonic()
    groups = initialize(
        config.parallel, seed=config.runtime.seed, timeout_minutes=config.runtime.collective_timeout_minutes
    )
    checkpoint = open_checkpoint(config.model)
    shape = checkpoint.shape
    blocks = build_blocks(
        config.data,
        checkpoint.tokenizer,
        "calibration",
        blocks=config.samples,
        vocab_size=shape.vocab_size,
        max_length=checkpoint.architecture.max_position_embeddings,
    )
    questions, task = _task(config, checkpoint)
    chunks = build_model(shape, checkpoint.architecture, groups, dtype=getattr(torch, config.runtime.dtype))
    load_into(chunks, checkpoint, groups)
    weights = fingerprint(checkpoint)
    journal = depth_journal(Journal.beside(config.output), _subject(config, weights, blocks, questions))
    known, greedy = _candidates(config, shape)
    with progress_bar("depth", len(known) - 1 + sum(greedy), shown=groups.is_main) as advance:
        scores = layer_importance(
            chunks,
            blocks,
            groups,
            shape=shape,
            micro_batch_size=config.micro_batch_size,
            single=config.single,
            block_lengths=config.block_lengths,
            greedy=config.greedy,
            greedy_by=config.greedy_by,
            task=task,
            task_name=config.task.given or "",
            fingerprint=weights,
            journal=journal,
            reuse_prefix=config.reuse_prefix,
            progress=advance,
        )
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


def _task(config: DepthConfig, checkpoint: Checkpoint) -> tuple[list[Question], EncodedTask | None]:
    """The questions and their tokens, or none of either."""
    from nemo_minitron.data.tasks import encode_task, read_task

    if config.task.given is None:
        return [], None
    questions = read_task(config.task, cache_dir=config.data.cache_dir, seed=config.data.seed)
    return questions, encode_task(
        questions,
        checkpoint.tokenizer,
        vocab_size=checkpoint.shape.vocab_size,
        max_length=checkpoint.architecture.max_position_embeddings,
        multiple=config.parallel.tensor if config.parallel.sequence_parallel else 1,
    )


def _subject(config: DepthConfig, weights: str, blocks: Blocks, questions: list[Question]) -> dict[str, Any]:
    """What each result depends on, so that a journal of something else is not taken up. Not the parallel layout."""
    task = json.dumps([[one.prompt, one.choices, one.answer] for one in questions])
    return {
        "fingerprint": weights,
        "blocks": blocks.content()[:32],
        "task": hashlib.sha256(task.encode()).hexdigest()[:32] if questions else None,
        "dtype": config.runtime.dtype,
    }
