"""``minitron search``: the shape within a budget with the lowest loss, without training and after a short distillation.

One process leads. It lists the shapes, starts the ranking (:mod:`nemo_minitron.stages.shared.search_ranking`) and then,
for each of the best candidates, the stages prune and distill in their own processes. The journal in the output records
the finished work.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron import axes
from nemo_minitron.checkpoints.model_record import peek_architecture, peek_family, peek_shape
from nemo_minitron.config import SearchConfig, StageConfig, TargetConfig
from nemo_minitron.errors import MinitronError, ShapeError
from nemo_minitron.jobs.launch import launch
from nemo_minitron.jobs.local import starter_of
from nemo_minitron.jobs.nested import run_child, show_output
from nemo_minitron.jobs.output import Output, claim_output
from nemo_minitron.jobs.plans import PlannedPath, StagePlan, human_bytes, human_count
from nemo_minitron.jobs.warm import keep_pool
from nemo_minitron.runtime.journal import Journal
from nemo_minitron.search import (
    Budget,
    LatencyCost,
    MemoryCost,
    ParameterCost,
    Result,
    SearchSpace,
    ShapeSet,
    Sizes,
    Workload,
    axis_values,
    by_candidate,
    search_journal,
    spread,
)
from nemo_minitron.search.results import JOURNAL_NAME
from nemo_minitron.shape import uniform_faults
from nemo_minitron.stages.shared.search_ranking import BASE, Work
from nemo_minitron.stages.shared.search_results import order, write_results

if TYPE_CHECKING:
    from nemo_minitron.shape import ModelShape

__all__ = ["plan", "run"]

logger = logging.getLogger(__name__)

#: Shapes that are timed to fit the latency of all others.
PROBES = 8
#: Settings that say which candidates there are, not what is found out about one.
_NOT_SUBJECT = {
    "space", "max_candidates", "best", "save_student", "student_layout", "measure_latency", "parallel", "rank_by",
}  # fmt: skip


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
    from nemo_minitron.checkpoints import open_checkpoint

    started = time.monotonic()
    checkpoint = open_checkpoint(config.model)
    shape = checkpoint.shape
    constants = checkpoint.architecture
    costs = Costs(config, shape, checkpoint.family, topk=constants.moe_router_topk, rotary=constants.rotary_percent)
    # An empty space is told before anything is written or run.
    shapes = costs.space().fitting(costs.budgets())
    output = claim_output(config)
    journal = search_journal(output, _subject(config))
    known = by_candidate(journal.read())
    if config.budget.latency_ms is not None:
        shapes = costs.space().fitting(costs.budgets(_fitted_latency(config, output, journal, costs, shapes)))
        known = by_candidate(journal.read())
    chosen = spread(shapes, config.max_candidates)
    names = {shapes.sizes(position).name: shapes.sizes(position) for position in chosen}
    resumed = sum("loss" in known.get(name, {}) for name in names)
    logger.info("%s shapes within the budget, %d to rank", f"{len(shapes):,}", len(names))

    work = Work([sizes for name, sizes in names.items() if not _is_ranked(config, known.get(name, {}))])
    if work.candidates or not _is_ranked(config, known.get(BASE, {})):
        _rank(config, output, work)
        known = by_candidate(journal.read())
    results = _results(config, costs, names, known)
    within = sorted(
        (result for result in results if result.state != "outside"), key=lambda result: order(config.rank_by, result)
    )
    if not within:
        raise MinitronError(_none_within(config, results))
    for number, result in enumerate(within[: config.best], 1):
        _distil(config, output, journal, result, f"{number} of {min(config.best, len(within))}")
    results = _results(config, costs, names, by_candidate(journal.read()))
    written = write_results(
        config,
        output,
        results,
        by_candidate(journal.read())[BASE],
        total=len(shapes),
        left_out=_left_out(shapes, chosen),
    )
    _tidy(config, output, written["best"])
    return {**_figures(written), "resumed": resumed, "seconds": round(time.monotonic() - started, 3)}


class Costs:
    """The space and the budgets of a configuration.

    Args:
        config: of the search.
        shape, table: of the unpruned model.
        topk: experts per token in a mixture of experts; no shape has fewer experts.
        rotary: part of a head's channels that RoPE rotates.
    """

    def __init__(
        self,
        config: SearchConfig,
        shape: ModelShape,
        table: axes.Family,
        *,
        topk: int | None = None,
        rotary: float = 1.0,
    ) -> None:
        self.config, self.shape, self.table, self.topk = config, shape, table, topk
        self.parameters = ParameterCost(table, shape)
        self.active = None if shape.num_moe_experts is None else ParameterCost(table, shape, active=topk or 1)
        budget, layout = config.budget, config.student_layout
        work = Workload.on(
            layout,
            training=budget.memory_of == "training",
            batch_size=budget.batch_size,
            sequence_length=budget.sequence_length,
            bytes=2 if budget.dtype == "bfloat16" else 4,
            recompute="full" if budget.recompute else "none",
        )
        self.memory = MemoryCost(table, shape, work, topk=topk, rotary=rotary)

    def space(self) -> SearchSpace:
        """The candidates of each axis.

        Raises:
            ShapeError: if an axis has none.
        """
        layout = self.config.student_layout
        values = {
            name: axis_values(
                name,
                getattr(self.shape, name) or 0,
                minimum=axis.min,
                maximum=axis.max,
                multiple=axis.multiple,
                values=axis.values,
            )
            for name, axis in self.config.space.given().items()
        }
        return SearchSpace(
            self.shape,
            values,
            tensor=layout.tensor,
            pipeline=layout.pipeline_stages,
            experts=self.topk or 1,
        )

    def budgets(self, latency: LatencyCost | None = None) -> list[Budget]:
        """Budgets of parameters and memory, and of fitted latency if it is known, with a margin for the fit's error.

        Raises:
            ShapeError: for a budget of active parameters of a model without experts.
        """
        budget, budgets = self.config.budget, []
        counts = [("parameters", budget.parameters, budget.share, self.parameters)]
        if self.active is not None:
            counts.append(("active_parameters", budget.active_parameters, budget.active_share, self.active))
        elif budget.active_parameters is not None or budget.active_share is not None:
            name = "active_parameters" if budget.active_share is None else "active_share"
            raise ShapeError(
                f"budget.{name}: the model has no experts: a token uses all parameters; give parameters or share"
            )
        for name, number, share, cost in counts:
            wanted = number if share is None else share * cost(Sizes.of(self.shape))
            if wanted is not None:
                low, high = wanted * (1 - budget.tolerance), wanted * (1 + budget.tolerance)
                budgets.append(Budget(name, low, high, cost, human_count))
        floor = 0.0 if budgets else budget.floor
        if budget.memory_gib is not None:
            high = budget.memory_gib * 2**30
            budgets.append(Budget("memory_gib", floor * high, high, self.memory, human_bytes))
        if budget.latency_ms is not None and latency is not None:
            high = budget.latency_ms / 1000
            room = min(latency.error, 0.5)
            budgets.append(
                Budget(
                    "latency_ms", floor * high * (1 - room), high * (1 + room), latency, lambda s: f"{1000 * s:.1f} ms"
                )
            )
        return budgets


def _peek_constants(model: str) -> dict[str, Any]:
    """The constants of a checkpoint that the costs need, from its record alone."""
    stated = peek_architecture(model)
    return {} if stated is None else {"topk": stated.moe_router_topk, "rotary": stated.rotary_percent}


def _fitted_latency(
    config: SearchConfig, output: Path, journal: Journal[tuple[str, dict[str, Any]]], costs: Costs, shapes: ShapeSet
) -> LatencyCost:
    """Latency of every shape, fitted to that of the unpruned model and of a few shapes spread over the space."""
    probes = [shapes.sizes(position) for position in spread(shapes, PROBES)]
    known = by_candidate(journal.read())
    missing = [sizes for sizes in probes if "prefill" not in known.get(sizes.name, {})]
    if missing:
        _rank(config, output, Work(missing, timed_only=True))
        known = by_candidate(journal.read())
    what = config.budget.latency_of
    measured = [(sizes, known[sizes.name][what]) for sizes in probes]
    # The unpruned model was timed in turn with each of them.
    ratios = [known[sizes.name][what] / known[sizes.name][f"{what}_ratio"] for sizes in probes]
    measured.append((Sizes.of(costs.shape), sorted(ratios)[len(ratios) // 2]))
    fitted = LatencyCost(costs.table, costs.shape, measured, topk=costs.topk)
    logger.info("latency fitted to %d shapes, largest error %.1f %%", len(measured), 100 * fitted.error)
    return fitted


def _subject(config: SearchConfig) -> dict[str, Any]:
    """Everything that a result depends on."""
    identity = Output(config).identity
    settings = {name: value for name, value in identity["settings"].items() if name not in _NOT_SUBJECT}
    workload = ("batch_size", "sequence_length")
    settings["budget"] = {name: settings["budget"][name] for name in workload}
    return settings | {name: parent["hash"] for name, parent in identity["parents"].items()}


def _finished(output: Path) -> int:
    """Candidates in the journal of an output, whatever its settings."""
    try:
        return sum(b'"loss"' in line for line in (output / JOURNAL_NAME).read_bytes().split(b"\n")[1:-1])
    except OSError:
        return 0


def _is_ranked(config: SearchConfig, values: dict[str, Any]) -> bool:
    measured = "loss" in values and ("accuracy" in values or config.task.given is None)
    return measured and ("prefill" in values or not config.timed)


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
    folder = output / "candidates" / result.name
    given = {name: size for name, size in result.sizes._asdict().items() if size is not None}
    logger.info("distilling %s: %s", label, result.name)
    started = time.monotonic()
    student: StageConfig = config.pruning(str(folder / "student"), TargetConfig(**given))
    run_child(student)
    if config.reconstruct_samples:
        student = config.reconstruction(str(folder / "reconstructed"), student.output)
        run_child(student)
    run_child(config.distillation(str(folder / "distilled"), student.output))
    seconds = round(time.monotonic() - started, 1)
    _rank(config, output, Work([result.sizes], distilled=str(folder / "distilled" / "model")))
    journal.append([(result.name, {"distill_seconds": seconds})])
    for part in ("student", "reconstructed", "distilled/checkpoints"):
        shutil.rmtree(folder / part, ignore_errors=True)


def _results(
    config: SearchConfig, costs: Costs, names: dict[str, Sizes], known: dict[str, dict[str, Any]]
) -> list[Result]:
    """The results of each candidate of this search."""
    fields = {field.name for field in dataclasses.fields(Result)}
    fields -= {"sizes", "parameters", "active_parameters", "memory", "outside"}
    budget, results = config.budget, []
    for name, sizes in names.items():
        values = {key: value for key, value in known.get(name, {}).items() if key in fields}
        measured, outside = values.get(budget.latency_of), None
        if budget.latency_ms is not None and measured is not None and 1000 * measured > budget.latency_ms:
            outside = f"{budget.latency_of} {1000 * measured:.1f} ms"
        results.append(
            Result(
                sizes,
                costs.parameters(sizes),
                active_parameters=None if costs.active is None else costs.active(sizes),
                memory=round(costs.memory(sizes)),
                outside=outside,
                **values,
            )
        )
    return results


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
