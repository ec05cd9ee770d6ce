"""The candidates of ``minitron search``: the shapes within the budgets, and what the journals know of them."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron import axes
from nemo_minitron.config import SearchConfig, StageConfig, TargetConfig
from nemo_minitron.errors import ShapeError
from nemo_minitron.jobs.output import Output
from nemo_minitron.jobs.plans import human_bytes, human_count
from nemo_minitron.search import (
    Budget,
    LatencyCost,
    MemoryCost,
    ParameterCost,
    Result,
    SearchSpace,
    Sizes,
    Workload,
    axis_values,
    by_candidate,
    candidate_journal,
    search_journal,
    spread,
)
from nemo_minitron.stages.shared.search_ranking import BASE, Work
from nemo_minitron.stages.shared.search_results import order

if TYPE_CHECKING:
    from nemo_minitron.shape import ModelShape

__all__ = [
    "Candidates",
    "Costs",
    "Known",
    "absorb",
    "candidate_folder",
    "findings",
    "measuring",
    "stages_of",
    "subject_of",
    "tidy",
]

logger = logging.getLogger(__name__)

#: Values by candidate.
Known = dict[str, dict[str, Any]]

#: Shapes that are timed to fit the latency of all others.
PROBES = 8
#: Settings that say which candidates there are, not what is found out about one.
_NOT_SUBJECT = {
    "space", "max_candidates", "best", "save_student", "student_layout", "measure_latency", "parallel", "rank_by",
}  # fmt: skip


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


class Candidates:
    """The shapes within the budgets of a search, and those of them that are ranked.

    Args:
        config: of the search.

    Raises:
        MinitronError: for a model that cannot be used, or if no shape is within the budgets.
    """

    def __init__(self, config: SearchConfig) -> None:
        from nemo_minitron.checkpoints import open_checkpoint

        checkpoint = open_checkpoint(config.model)
        constants = checkpoint.architecture
        self.config = config
        self.costs = Costs(
            config,
            checkpoint.shape,
            checkpoint.family,
            topk=constants.moe_router_topk,
            rotary=constants.rotary_percent,
        )
        self.shapes = self.costs.space().fitting(self.costs.budgets())

    def probing(self, known: Known) -> Work | None:
        """The shapes to time before the latency of all others is known; None where that is no budget, or they are."""
        if self.config.budget.latency_ms is None:
            return None
        missing = [sizes for sizes in self._probes() if "prefill" not in known.get(sizes.name, {})]
        return Work(missing, timed_only=True) if missing else None

    def fit_latency(self, known: Known) -> None:
        """Keep the shapes within the budget of latency, if there is one: fitted to that of the unpruned model and of a
        few shapes spread over the space.
        """
        if self.config.budget.latency_ms is None:
            return
        costs, probes = self.costs, self._probes()
        what = self.config.budget.latency_of
        measured = [(sizes, known[sizes.name][what]) for sizes in probes]
        # The unpruned model was timed in turn with each of them.
        ratios = [known[sizes.name][what] / known[sizes.name][f"{what}_ratio"] for sizes in probes]
        measured.append((Sizes.of(costs.shape), sorted(ratios)[len(ratios) // 2]))
        fitted = LatencyCost(costs.table, costs.shape, measured, topk=costs.topk)
        logger.info("latency fitted to %d shapes, largest error %.1f %%", len(measured), 100 * fitted.error)
        self.shapes = costs.space().fitting(costs.budgets(fitted))

    def _probes(self) -> list[Sizes]:
        return [self.shapes.sizes(position) for position in spread(self.shapes, PROBES)]

    @property
    def chosen(self) -> list[int]:
        """Positions of the shapes to rank."""
        return spread(self.shapes, self.config.max_candidates)

    def named(self) -> dict[str, Sizes]:
        """The shapes to rank, by name."""
        return {self.shapes.sizes(position).name: self.shapes.sizes(position) for position in self.chosen}

    def ranking(self, known: Known) -> Work | None:
        """What is to be ranked; None where all is."""
        work = Work([sizes for name, sizes in self.named().items() if not self._is_ranked(known.get(name, {}))])
        return work if work.candidates or not self._is_ranked(known.get(BASE, {})) else None

    def _is_ranked(self, values: dict[str, Any]) -> bool:
        measured = "loss" in values and ("accuracy" in values or self.config.task.given is None)
        return measured and ("prefill" in values or not self.config.timed)

    def results(self, known: Known) -> list[Result]:
        """The results of each candidate of this search."""
        config, costs = self.config, self.costs
        fields = {field.name for field in dataclasses.fields(Result)}
        fields -= {"sizes", "parameters", "active_parameters", "memory", "outside"}
        budget, results = config.budget, []
        for name, sizes in self.named().items():
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

    def within(self, known: Known) -> list[Result]:
        """The ranked candidates within the budgets, the best first: the first ``best`` are distilled."""
        within = (result for result in self.results(known) if result.state != "outside")
        return sorted(within, key=lambda result: order(self.config.rank_by, result))


def candidate_folder(config: SearchConfig, name: str) -> Path:
    """The directory of a candidate that is distilled."""
    return Path(config.output) / "candidates" / name


def stages_of(config: SearchConfig, sizes: Sizes) -> list[StageConfig]:
    """The stages that a candidate goes through, in order: pruned, refitted if asked for, and distilled."""
    folder = candidate_folder(config, sizes.name)
    given = {name: size for name, size in sizes._asdict().items() if size is not None}
    stages: list[StageConfig] = [config.pruning(str(folder / "student"), TargetConfig(**given))]
    if config.reconstruct_samples:
        stages.append(config.reconstruction(str(folder / "reconstructed"), stages[-1].output))
    return [*stages, config.distillation(str(folder / "distilled"), stages[-1].output)]


def measuring(config: SearchConfig, sizes: Sizes) -> Work:
    """The measurement of a distilled candidate."""
    return Work([sizes], distilled=str(candidate_folder(config, sizes.name) / "distilled" / "model"))


def tidy(config: SearchConfig, name: str) -> None:
    """Remove what a measured candidate no longer needs."""
    for part in ("student", "reconstructed", "distilled/checkpoints"):
        shutil.rmtree(candidate_folder(config, name) / part, ignore_errors=True)


def subject_of(config: SearchConfig) -> dict[str, Any]:
    """Everything that a result depends on."""
    identity = Output(config).identity
    settings = {name: value for name, value in identity["settings"].items() if name not in _NOT_SUBJECT}
    workload = ("batch_size", "sequence_length")
    settings["budget"] = {name: settings["budget"][name] for name in workload}
    return settings | {name: parent["hash"] for name, parent in identity["parents"].items()}


def findings(config: SearchConfig) -> Known:
    """What the journals of the search and of its candidates know, which stay as they are."""
    output, subject = Path(config.output), subject_of(config)
    lines = search_journal(output, subject).peek()
    for folder in sorted((output / "candidates").glob("*")):
        lines += candidate_journal(folder, subject).peek()
    return by_candidate(lines)


def absorb(config: SearchConfig) -> None:
    """Take what jobs have measured of candidates into the search's journal, which has been read."""
    output, subject = Path(config.output), subject_of(config)
    journal = search_journal(output, subject)
    known = by_candidate(journal.peek())
    for folder in sorted((output / "candidates").glob("*")):
        measured = candidate_journal(folder, subject)
        lines = measured.peek()
        if new := [line for line in lines if not line[1].items() <= known.get(line[0], {}).items()]:
            journal.append(new)
        measured.close()
