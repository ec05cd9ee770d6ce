"""The outputs of ``minitron search``: the results as JSON and as a table, the Pareto plot, and the best shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.config import SearchConfig
from nemo_minitron.runtime.files import replace_file
from nemo_minitron.search import Result, Sizes, kendall_tau, pareto_front
from nemo_minitron.search.results import FILE_NAME, FORMAT_VERSION

__all__ = ["write_results"]

#: What a loss is set against, where it is known.
COSTS = ("parameters", "memory", "prefill", "decode")


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

    order = sorted(results, key=_rank)
    distilled = [result for result in order if result.distilled_loss is not None]
    best = order[0]
    content = {
        "format_version": FORMAT_VERSION,
        "shapes": total,
        "left_out": total - len(results),
        "best": best.name,
        "unpruned": unpruned,
        "tokens": config.samples * config.data.sequence_length,
        "distill_tokens": config.distill.steps * config.distill.global_batch_size * config.data.sequence_length,
        "kendall_tau": kendall_tau(
            [result.loss or 0.0 for result in distilled], [result.distilled_loss or 0.0 for result in distilled]
        ),
        "pareto": {cost: _front(order, cost) for cost in COSTS if getattr(best, cost) is not None},
        "candidates": [result.to_dict() for result in order],
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


def _rank(result: Result) -> tuple[bool, bool, float, str]:
    """Sort key: distilled candidates by distilled loss, then the others by loss, those outside a budget last."""
    outside, undistilled = result.state == "outside", result.distilled_loss is None
    loss = result.loss if undistilled else result.distilled_loss
    return outside, undistilled, float("inf") if loss is None else loss, result.name


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
