"""The outputs of ``minitron search``: the results as JSON and as a table, the Pareto plot, and the best shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.config import SearchConfig
from nemo_minitron.runtime.files import replace_file
from nemo_minitron.search import Result, Sizes, kendall_tau, pareto_front
from nemo_minitron.search.results import FILE_NAME, FORMAT_VERSION

__all__ = ["order", "write_results"]

#: What a loss is set against, where it is known.
COSTS = ("parameters", "active_parameters", "memory", "prefill", "decode")


def write_results(
    config: SearchConfig,
    output: Path,
    results: list[Result],
    unpruned: dict[str, Any],
    *,
    total: int,
    left_out: list[Sizes],
) -> dict[str, Any]:
    """Write all files of a finished search.

    Args:
        config: of the search.
        output: its directory.
        results: of all candidates; at least one is ranked.
        unpruned: measurements of the unpruned model.
        total: number of shapes within the budget.
        left_out: those of them that were not ranked.

    Returns:
        The content of ``search.json``.
    """
    from nemo_minitron.report.search import pareto, table

    by = config.rank_by
    ranked = sorted(results, key=lambda result: _rank(by, result))
    distilled = [result for result in ranked if result.distilled_loss is not None]
    best = ranked[0]
    content = {
        "format_version": FORMAT_VERSION,
        "shapes": total,
        "left_out": total - len(results),
        "best": best.name,
        "unpruned": unpruned,
        "tokens": config.samples * config.data.sequence_length,
        "distill_tokens": config.distill.steps * config.distill.global_batch_size * config.data.sequence_length,
        "kendall_tau": kendall_tau(
            _places(distilled, lambda result: order(by, result)),
            _places(distilled, lambda result: order(by, result, distilled=True)),
        ),
        "rank_by": by,
        "task": config.task.given,
        "pareto": {cost: _front(ranked, cost) for cost in COSTS if getattr(best, cost) is not None},
        "candidates": [result.to_dict() for result in ranked],
        "budget": vars(config.budget),
    }
    if left_out:
        lines = [json.dumps({"name": sizes.name, **sizes._asdict()}) for sizes in left_out]
        replace_file(output / "left_out.jsonl", "\n".join(lines) + "\n")
    replace_file(output / "search.md", table(content))
    if (figure := pareto(content)) is not None:
        replace_file(output / "pareto.png", figure.light)
    replace_file(output / "best.yaml", _best(config, output, best))
    replace_file(output / FILE_NAME, json.dumps(content, indent=2) + "\n")
    return content


def order(by: str, result: Result, *, distilled: bool = False) -> tuple[float, float, str]:
    """Sort key of one measurement, the best first: by the loss, or by the accuracy on the task and then the loss."""
    loss = result.distilled_loss if distilled else result.loss
    accuracy = (result.distilled_accuracy if distilled else result.accuracy) if by == "task" else None
    return -(accuracy or 0.0), float("inf") if loss is None else loss, result.name


def _rank(by: str, result: Result) -> tuple[Any, ...]:
    """Sort key: distilled candidates as they are distilled, then the others, those outside a budget last."""
    outside, undistilled = result.state == "outside", result.distilled_loss is None
    return outside, undistilled, *order(by, result, distilled=not undistilled)


def _places(results: list[Result], key: Callable[[Result], tuple[float, float, str]]) -> list[float]:
    """Of each result its place in an order; results with the same values share theirs."""
    values = [key(result)[:2] for result in results]
    places = {value: float(place) for place, value in enumerate(sorted(set(values)))}
    return [places[value] for value in values]


def _front(results: list[Result], cost: str) -> dict[str, list[str]]:
    """Names of the candidates that no other beats in both cost and loss, before and after the distillation."""
    fronts = {}
    for loss in ("loss", "distilled_loss"):
        known = [result for result in results if result.state != "outside" and getattr(result, loss) is not None]
        front = pareto_front([(getattr(result, cost), getattr(result, loss)) for result in known])
        if known:
            fronts[loss] = [known[position].name for position in front]
    return fronts


def _best(config: SearchConfig, output: Path, best: Result) -> str:
    """Write a configuration of ``minitron prune`` for the best shape."""
    target = {name: size for name, size in best.sizes._asdict().items() if size is not None}
    settings: dict[str, Any] = {
        "model": config.model,
        "scores": config.scores,
        "output": str(output.with_name(f"{output.name}-{best.name}")),
        "method": config.method,
        "depth": vars(config.depth),
        "depth_scores": config.depth_scores,
        "target": target,
    }
    head = f"# The best shape of {output}.\n#   minitron prune {output / 'best.yaml'}\n"
    return head + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
