"""``minitron evaluate``: held-out loss and generations of several models, one after another, on the same tokens."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron import axes
from nemo_minitron.checkpoints.model_record import peek_family, peek_shape
from nemo_minitron.config import EvaluateConfig
from nemo_minitron.jobs.atomic import stage_output
from nemo_minitron.jobs.plans import PlannedPath, StagePlan, human_count
from nemo_minitron.runtime.progress import progress_bar
from nemo_minitron.runtime.requirements import require
from nemo_minitron.shape import uniform_faults
from nemo_minitron.stages.shared.measuring import live_model, start_groups
from nemo_minitron.stages.shared.memory import weights_of_rank
from nemo_minitron.stages.shared.streaming import plan_streaming, scratch, state_budget, streamed_model, streams
from nemo_minitron.stages.shared.vocabulary import plan_vocabularies

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.data import Blocks
    from nemo_minitron.evaluation import HeldOutLoss
    from nemo_minitron.runtime.groups import Groups

__all__ = ["FILE_NAME", "plan", "run"]

FILE_NAME = "evaluation.json"
logger = logging.getLogger(__name__)


def plan(config: EvaluateConfig) -> StagePlan:
    """What :func:`run` would read, write and cost."""
    from nemo_minitron.data.inputs import data_inputs

    data = data_inputs(config.data)
    layout = config.parallel
    blocks = config.tokens // config.data.sequence_length
    plan = StagePlan(
        "evaluate",
        reads=[PlannedPath(path, f"model {name!r}") for name, path in config.models.items()],
        writes=[PlannedPath(str(Path(config.output) / FILE_NAME), "losses and generations")],
        costs={"held-out tokens": f"{blocks * config.data.sequence_length:,} in {blocks:,} blocks, for each model"},
        notes=data.notes,
        faults=data.faults,
    )
    plan.reads += [PlannedPath(path, what) for path, what in data.files]
    if config.harness.include_path is not None:
        plan.reads.append(PlannedPath(config.harness.include_path, "tasks"))
    if config.harness.tasks:
        from nemo_minitron.evaluation.packs import PACKS

        plan.costs["benchmarks"] = ", ".join(config.harness.tasks)
        if any(task not in PACKS for task in config.harness.tasks):
            plan.notes.append("benchmarks: lm-evaluation-harness downloads the data sets that are not cached yet")
    shapes = {name: shape for name, path in config.models.items() if (shape := peek_shape(path)) is not None}
    for name, shape in shapes.items():
        faults = uniform_faults(shape, "evaluation")
        faults += shape.layout_faults(tensor=layout.tensor, pipeline=layout.pipeline_stages)
        plan.faults += [f"model {name!r}: {fault}" for fault in faults]
    if shapes:
        counts = [axes.parameter_count(peek_family(config.models[name]), shape) for name, shape in shapes.items()]
        plan.costs["parameters"] = ", ".join(
            f"{name} {human_count(count)}" for name, count in zip(shapes, counts, strict=True)
        )
        # Two operations for each weight and token; attention scores are small beside it at these lengths.
        flops = 2.0 * sum(counts) * blocks * config.data.sequence_length
        plan.costs["FLOPs"] = human_count(flops)
        plan.flops = flops if len(shapes) == len(config.models) else None
        plan.costs["memory of a rank"] = weights_of_rank(config, *config.models.values())
    plan_streaming(plan, config, *config.models.values())
    first, *others = ((_called(name), path) for name, path in _baseline_first(config).items())
    plan_vocabularies(plan, first, *others)
    return plan


def _baseline_first(config: EvaluateConfig) -> dict[str, str]:
    """The models, of which the baseline's tokenizer cuts the text."""
    baseline = config.baseline or next(iter(config.models))
    return {baseline: config.models[baseline], **config.models}


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate every model; rank 0 writes ``evaluation.json``.

    Returns:
        Its content: ``tokens, asked_tokens, uncounted, blocks, sequence_length, baseline, models``; ``uncounted`` is
        how many labels do not count, by reason. Each model has ``loss, perplexity, standard_error, domains, parameters,
        shape, format, generations, generated_by, tokens_per_second, seconds``, and ``harness`` (by task) where
        benchmarks were asked for.

    Raises:
        MinitronError: for a checkpoint or text that cannot be used.
    """
    from nemo_minitron.checkpoints import open_checkpoint

    groups = start_groups(config)
    checkpoints = {name: open_checkpoint(path) for name, path in config.models.items()}
    baseline = config.baseline or next(iter(checkpoints))
    blocks = _held_out(config, checkpoints, baseline)
    models = {}
    for name, checkpoint in checkpoints.items():
        models[name] = _evaluate(config, groups, name, checkpoint, blocks)
        gc.collect()  # Megatron's modules hold cycles: without this the next model stands beside this one.
    result = {
        "tokens": sum(part.labels for part in blocks.values()),
        "asked_tokens": config.tokens,
        "uncounted": dict(sum((Counter(part.uncounted()) for part in blocks.values()), Counter())),
        "blocks": sum(len(part) for part in blocks.values()),
        "sequence_length": config.data.sequence_length,
        "baseline": baseline,
        "models": models,
    }
    if groups.is_main:
        with stage_output(config.output, config.overwrite) as output:
            (output / FILE_NAME).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _held_out(config: EvaluateConfig, checkpoints: dict[str, Checkpoint], baseline: str) -> dict[str, Blocks]:
    """``[n, s + 1]`` blocks by source, cut with the baseline's tokenizer; every model must know their tokens.

    Models may differ in rows, in added tokens, in what ends a text and in chat templates; a warning names it.
    """
    from nemo_minitron.accounting import warn_once
    from nemo_minitron.checkpoints.tokenizer.comparison import Vocabulary, compare, warnings_of
    from nemo_minitron.data import build_domain_blocks

    vocabularies = {name: Vocabulary.of(_called(name), checkpoint) for name, checkpoint in checkpoints.items()}
    reference = vocabularies.pop(baseline)
    shared = {name: compare(reference, vocabulary) for name, vocabulary in vocabularies.items()}
    for warning in warnings_of(shared.values()):
        warn_once("evaluation", warning)
    blocks = build_domain_blocks(
        config.data,
        reference.tokenizer,
        "held_out",
        blocks=config.tokens // config.data.sequence_length,
        vocab_size=reference.rows,
        max_length=min(checkpoint.architecture.max_position_embeddings for checkpoint in checkpoints.values()),
    )
    for common in shared.values():
        for source, part in {} if common.whole else blocks.items():
            part.check_common(common.size, common.unlike, what=f"held-out text {source!r}", names=common.names)
    return blocks


def _called(name: str) -> str:
    return f"model {name!r}"


def _evaluate(
    config: EvaluateConfig, groups: Groups, name: str, checkpoint: Checkpoint, blocks: dict[str, Blocks]
) -> dict[str, Any]:
    """Evaluate one model: build, load, measure, generate."""
    from nemo_minitron.evaluation import generate, generate_megatron, held_out_loss

    started = time.monotonic()
    shape = checkpoint.shape
    total = sum(len(part) for part in blocks.values())
    chunks: list[GPTModel] = []
    streamed = not (config.prompts or config.harness.tasks) and streams(config, checkpoint, groups)
    if streamed:
        began = time.monotonic()
        loss = _streamed_loss(config, groups, name, checkpoint, blocks)
    else:
        chunks = live_model(config, checkpoint, groups)
        # The first pass of a process takes longer, and would make the first model look slow.
        first = {source: part[:1] for source, part in list(blocks.items())[:1]}
        held_out_loss(chunks, groups, first, config.micro_batch_size, vocab_size=shape.vocab_size)
        began = time.monotonic()
        with progress_bar(f"held-out loss of {name}", total, shown=groups.is_main) as advance:
            loss = held_out_loss(
                chunks, groups, blocks, config.micro_batch_size, vocab_size=shape.vocab_size, progress=advance
            )
    measured = time.monotonic() - began
    benchmarks = {"harness": _benchmarks(config, groups, name, checkpoint, chunks)} if config.harness.tasks else {}
    by_transformers = checkpoint.format == "hf"
    answers = []
    if config.prompts and by_transformers:
        # An export is tried with the library that it is made for.
        del chunks
        if groups.is_main:
            answers = generate(
                checkpoint.path, config.prompts, max_new_tokens=config.max_new_tokens, dtype=config.runtime.dtype
            )
    elif config.prompts:
        from nemo_minitron.data import load_tokenizer

        answers = generate_megatron(
            chunks,
            groups,
            load_tokenizer(checkpoint.tokenizer),
            config.prompts,
            max_new_tokens=config.max_new_tokens,
            vocab_size=shape.vocab_size,
            end_tokens=checkpoint.architecture.end_tokens,
        )
    if groups.is_main:
        logger.info(
            "%s: loss %.4f, perplexity %.2f, %s tokens in %.1f s",
            name, loss.overall.loss, loss.overall.perplexity, f"{loss.overall.tokens:,}", measured,
        )  # fmt: skip
    return {
        **loss.to_dict(),
        **benchmarks,
        "parameters": axes.parameter_count(checkpoint.family, shape),
        "shape": shape.to_dict(),
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "generations": [answer.to_dict() for answer in answers],
        "generated_by": "transformers" if by_transformers else "megatron-core",
        # Every position of a block is computed, whether its label counts or not.
        # Of a streamed pass it would be the disk's speed.
        "tokens_per_second": None if streamed else round(total * config.data.sequence_length / measured, 1),
        "seconds": round(time.monotonic() - started, 2),
    }


def _streamed_loss(
    config: EvaluateConfig, groups: Groups, name: str, checkpoint: Checkpoint, blocks: dict[str, Blocks]
) -> HeldOutLoss:
    """The loss of a model that is in memory layer by layer."""
    from nemo_minitron.evaluation import streamed_loss

    parts = checkpoint.shape.num_layers + 1
    directory = scratch(config)
    try:
        with progress_bar(f"held-out loss of {name}, layer by layer", parts, shown=groups.is_main) as advance:
            return streamed_loss(
                streamed_model(config, checkpoint, groups),
                blocks,
                config.micro_batch_size,
                budget=state_budget(config),
                spill=directory / f"states-{groups.dp_rank}.bin",
                progress=advance,
            )
    finally:
        if groups.is_main:
            shutil.rmtree(directory, ignore_errors=True)


def _benchmarks(
    config: EvaluateConfig, groups: Groups, name: str, checkpoint: Checkpoint, chunks: list[GPTModel]
) -> dict[str, Any]:
    """Results of lm-evaluation-harness by task."""
    from nemo_minitron.data import load_tokenizer

    require("lm_eval", for_="evaluation with harness.tasks")
    from nemo_minitron.evaluation.harness import MegatronLM, run_tasks

    harness = config.harness
    model = MegatronLM(
        chunks,
        groups,
        load_tokenizer(checkpoint.tokenizer),
        vocab_size=checkpoint.shape.vocab_size,
        max_length=checkpoint.architecture.max_position_embeddings,
        end_tokens=checkpoint.architecture.end_tokens,
        batch_size=harness.batch_size,
        seed=config.runtime.seed,
    )
    results = run_tasks(
        model,
        harness.tasks,
        include_path=harness.include_path,
        num_fewshot=harness.num_fewshot,
        limit=harness.limit,
        chat_template=harness.chat_template,
        seed=config.runtime.seed,
        cache_dir=config.data.cache_dir,
    )
    if groups.is_main:
        for task, result in results.items():
            values = ", ".join(f"{metric} {value:.4g}" for metric, value in result["metrics"].items())
            logger.info("%s: %s: %s", name, task, values or f"{result['samples']} conversations answered")
    return results
