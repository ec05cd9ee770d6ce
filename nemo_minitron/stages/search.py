"""``minitron search``: the shape within a budget with the lowest loss, without training and after a short distillation.

One process leads. It lists the shapes, starts the ranking (:mod:`nemo_minitron.stages.shared.search_ranking`) and then,
for each of the best candidates, the stages prune and distill in their own processes. The journal in the output records
the finished work. On a cluster all of these are jobs of their own (:mod:`nemo_minitron.stages.shared.search_jobs`), and
what runs here at the end finds everything done.
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoints.model_record import peek_architecture, peek_family, peek_shape
from nemo_minitron.config import SearchConfig
from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs.launch import launch
from nemo_minitron.jobs.local import starter_of
from nemo_minitron.jobs.nested import run_child, show_output
from nemo_minitron.jobs.output import claim_output
from nemo_minitron.jobs.plans import PlannedPath, StagePlan, human_count
from nemo_minitron.jobs.warm import keep_pool
from nemo_minitron.runtime.journal import Journal
from nemo_minitron.search import (
    Result,
    ShapeSet,
    Sizes,
    by_candidate,
    search_journal,
    spread,
)
from nemo_minitron.search.results import JOURNAL_NAME
from nemo_minitron.shape import uniform_faults
from nemo_minitron.stages.shared.search_candidates import (
    Candidates,
    Costs,
    Known,
    absorb,
    measuring,
    stages_of,
    subject_of,
    tidy,
)
from nemo_minitron.stages.shared.search_ranking import BASE, Work
from nemo_minitron.stages.shared.search_results import write_results

if TYPE_CHECKING:
    pass

__all__ = ["plan", "run"]

logger = logging.getLogger(__name__)


def plan(config: SearchConfig) -> StagePlan:
    """What :func:`run` would read, write and cost; counts the shapes if the model exists."""
    from nemo_minitron.data.inputs import data_inputs

    data, shape = data_inputs(config.data), peek_shape(config.model)
    length = config.data.sequence_length
    plan = StagePlan(
        "search",
        reads=[
            PlannedPath(config.model, "model"),
            PlannedPath(config.scores, "scores"),
            *(PlannedPath(path, what) for path, what in data.files),
        ],
        writes=[PlannedPath(config.output, "results, table, plot, best.yaml")],
        costs={"calibration": f"{config.samples * length:,} tokens in {config.samples:,} samples, for each candidate"},
        notes=data.notes,
        faults=data.faults,
    )
    if config.depth_scores is not None:
        plan.reads.append(PlannedPath(config.depth_scores, "depth scores"))
    if config.task.path is not None:
        plan.reads.append(PlannedPath(config.task.path, "task"))
    if shape is None:
        return plan
    if faults := uniform_faults(shape, "a search of uniform shapes"):
        plan.faults += faults
        return plan
    layout = config.parallel
    plan.faults += shape.layout_faults(tensor=layout.tensor, pipeline=layout.pipeline)
    try:
        costs = Costs(config, shape, peek_family(config.model), **_peek_constants(config.model))
        shapes = costs.space().fitting(costs.budgets())
        chosen = [shapes.sizes(position) for position in spread(shapes, config.max_candidates)]
    except MinitronError as error:
        plan.faults += getattr(error, "faults", [str(error)])
        return plan
    counts = [costs.parameters(sizes) for sizes in chosen]
    own = costs.parameters(Sizes.of(shape))
    left_out = len(shapes) - len(chosen)
    plan.costs["shapes"] = f"{len(shapes):,} within the budget, {len(chosen):,} to rank" + (
        f", spread over all ({left_out:,} left out)" if left_out else ""
    )
    plan.costs["parameters"] = f"{human_count(own)} -> {human_count(min(counts))} to {human_count(max(counts))}"
    plan.flops = 2.0 * config.samples * length * (sum(counts) + own)
    if config.reconstruct_samples:
        # Forward, for each candidate: the model once, the candidate some three times.
        tokens = config.reconstruct_samples * length
        plan.flops += 2.0 * tokens * (len(chosen) * own + 3 * sum(counts))
        plan.costs["reconstruction"] = (
            f"{tokens:,} tokens in {config.reconstruct_samples:,} samples, for each candidate"
        )
    plan.costs["FLOPs of the ranking"] = human_count(plan.flops)
    best = min(config.best, len(chosen))
    if best:
        tokens = config.distill.steps * config.distill.global_batch_size * length
        each = (6 * sum(counts) / len(counts) + 2 * own) * tokens
        plan.costs["distillation"] = (
            f"{best} candidates, {human_count(tokens)} tokens in {config.distill.steps} steps each"
        )
        plan.costs["FLOPs of the distillation"] = human_count(best * each)
        plan.flops += best * each
    done = _finished(Path(config.output))
    if done:
        plan.notes.append(f"{done} results of an earlier run are there and are taken up")
    return plan


def run(config: SearchConfig) -> dict[str, Any]:
    """Search. Writes ``search.json``, ``search.md``, ``pareto.png``, ``best.yaml`` and the journal into the output.

    Returns:
        ``shapes`` (number within the budget), ``candidates, outside, ranked, distilled, resumed, best`` (its name),
        ``parameters, loss, distilled_loss`` (of the best, and where they are known ``active_parameters, accuracy,
        distilled_accuracy``), ``kendall_tau`` (between the two orders), ``seconds``.

    Raises:
        MinitronError: for a model, scores or text that cannot be used, an empty space, or another search's output.
    """
    started = time.monotonic()
    # An empty space is told before anything is written or run.
    candidates = Candidates(config)
    output = claim_output(config)
    journal = search_journal(output, subject_of(config))

    def known() -> Known:
        return by_candidate(journal.read())

    known()
    absorb(config)
    if (probing := candidates.probing(known())) is not None:
        _rank(config, output, probing)
    candidates.fit_latency(known())
    names = candidates.named()
    resumed = sum("loss" in known().get(name, {}) for name in names)
    logger.info("%s shapes within the budget, %d to rank", f"{len(candidates.shapes):,}", len(names))

    if (work := candidates.ranking(known())) is not None:
        _rank(config, output, work)
    within = candidates.within(known())
    if not within:
        raise MinitronError(_none_within(config, candidates.results(known())))
    for number, result in enumerate(within[: config.best], 1):
        _distil(config, output, journal, result, f"{number} of {min(config.best, len(within))}")
    written = write_results(
        config,
        output,
        candidates.results(known()),
        known()[BASE],
        total=len(candidates.shapes),
        left_out=_left_out(candidates.shapes, candidates.chosen),
    )
    _tidy(config, output, written["best"])
    return {**_figures(written), "resumed": resumed, "seconds": round(time.monotonic() - started, 3)}


def _peek_constants(model: str) -> dict[str, Any]:
    """The constants of a checkpoint that the costs need, from its record alone."""
    stated = peek_architecture(model)
    return {} if stated is None else {"topk": stated.moe_router_topk, "rotary": stated.rotary_percent}


def _finished(output: Path) -> int:
    """Candidates in the journal of an output, whatever its settings."""
    try:
        return sum(b'"loss"' in line for line in (output / JOURNAL_NAME).read_bytes().split(b"\n")[1:-1])
    except OSError:
        return 0


def _rank(config: SearchConfig, output: Path, work: Work) -> None:
    """Start the ranking on its own ranks; it adds to the journal."""
    folder = output / "logs" / work.name
    folder.mkdir(parents=True, exist_ok=True)
    work.save(config, folder)
    keep_pool(config.runtime.device)
    launch(
        "nemo_minitron.jobs.worker",
        ["search", "shared.search_ranking"],
        world_size=config.parallel.world_size,
        folder=folder,
        threads=config.runtime.threads,
        on_output=show_output,
        starter=starter_of(config),
    )


def _distil(
    config: SearchConfig, output: Path, journal: Journal[tuple[str, dict[str, Any]]], result: Result, label: str
) -> None:
    """Prune, distil and measure one candidate; finished steps are not repeated."""
    if result.distilled_loss is not None:
        return
    logger.info("distilling %s: %s", label, result.name)
    started = time.monotonic()
    for stage in stages_of(config, result.sizes):
        run_child(stage)
    seconds = round(time.monotonic() - started, 1)
    _rank(config, output, measuring(config, result.sizes))
    journal.append([(result.name, {"distill_seconds": seconds})])
    tidy(config, result.name)


def _none_within(config: SearchConfig, results: list[Result]) -> str:
    what = config.budget.latency_of
    fastest = min(results, key=lambda result: getattr(result, what))
    return (
        f"budget.latency_ms={config.budget.latency_ms}: no candidate's {what} is within it; the fastest takes "
        f"{1000 * getattr(fastest, what):.2f} ms ({fastest.name}); raise it or widen the space"
    )


def _left_out(shapes: ShapeSet, chosen: list[int]) -> list[Sizes]:
    """The shapes within the budget that are not ranked, at most 100,000 of them."""
    taken = set(chosen)
    left_out = []
    for position in range(len(shapes)):
        if position not in taken:
            left_out.append(shapes.sizes(position))
            if len(left_out) == 100_000:
                break
    return left_out


def _tidy(config: SearchConfig, output: Path, best: str) -> None:
    """Remove the students; the best is kept if the configuration asks for it."""
    for folder in (output / "candidates").glob("*"):
        if not (config.save_student and folder.name == best):
            shutil.rmtree(folder)
    if not any((output / "candidates").glob("*")):
        shutil.rmtree(output / "candidates", ignore_errors=True)


def _figures(results: dict[str, Any]) -> dict[str, Any]:
    """The record's metrics."""
    states = [candidate["state"] for candidate in results["candidates"]]
    best = next(candidate for candidate in results["candidates"] if candidate["name"] == results["best"])
    return {
        "shapes": results["shapes"],
        "candidates": len(states),
        "outside": states.count("outside"),
        "ranked": states.count("ranked") + states.count("distilled"),
        "distilled": states.count("distilled"),
        "best": best["name"],
        **{name: best[name] for name in ("parameters", "loss", "distilled_loss")},
        **{
            name: best[name]
            for name in ("active_parameters", "accuracy", "distilled_accuracy")
            if best[name] is not None
        },
        "kendall_tau": results["kendall_tau"],
    }
