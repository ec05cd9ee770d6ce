"""Results of lm-evaluation-harness: as a table, and in the Hub's ``model-index`` form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_minitron.report.run import Run
from nemo_minitron.report.tables import Table

__all__ = ["benchmark_table", "first_metric", "index_results", "value_and_error"]


def benchmark_table(run: Run, evaluation: dict[str, Any]) -> Table | None:
    """Metrics of lm-evaluation-harness, one row per task and metric; None if no task was run."""
    models = {name: model["harness"] for name, model in evaluation["models"].items() if model.get("harness")}
    rows = []
    for task in dict.fromkeys(task for results in models.values() for task in results):
        values = [results.get(task) for results in models.values()]
        for metric in dict.fromkeys(name for result in values for name in _metrics(result) if "_stderr" not in name):
            rows.append([task, metric, *(_shown(result, metric) for result in values)])
    if not rows:
        return None
    return Table("lm-evaluation-harness, value ± standard error", ["task", "metric", *models], rows)


def index_results(name: str, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of a model in ``model-index`` form: held-out loss, and each benchmark.

    The form is that of https://github.com/huggingface/hub-docs/blob/main/modelcard.md, which ``huggingface_hub`` reads
    (``ModelCard.data.eval_results``).

    Args:
        name: of the model in the evaluation.
        evaluation: content of ``evaluation.json``.
    """
    model = evaluation["models"][name]
    sources = ", ".join(sorted(model["domains"]))
    results = [
        _result(
            "text",
            f"held-out text ({sources})",
            [{"type": "cross-entropy", "value": round(model["loss"], 4), "name": "held-out loss, nats a token"}],
        )
    ]
    for task, result in (model.get("harness") or {}).items():
        values = {metric: value for metric, value in _metrics(result).items() if "_stderr" not in metric}
        metrics = []
        for metric, value in values.items():
            kind, _, form = metric.partition(",")
            title = f"{kind}, {form}" if form and form != "none" else kind
            metrics.append({"type": kind, "value": round(value, 6), "name": title})
        if metrics:
            shots = result.get("num_fewshot")
            more = {} if not isinstance(shots, int) else {"args": {"num_few_shot": shots}}
            results.append(_result(task, _title(task, result), metrics, **more))
    return results


def _result(kind: str, title: str, metrics: list[dict[str, Any]], **dataset: Any) -> dict[str, Any]:
    return {
        "task": {"type": "text-generation"},
        "dataset": {"type": kind, "name": title, **dataset},
        "metrics": metrics,
    }


def _title(task: str, result: Mapping[str, Any]) -> str:
    """A task's name, with the number of its documents that were asked."""
    samples = result.get("samples")
    return f"{task} ({samples:,} documents)" if isinstance(samples, int) else task


def _metrics(result: Any) -> dict[str, float]:
    """The numbers of a task; none of one that has only answers, or of one that cannot be understood."""
    metrics = result.get("metrics") if isinstance(result, Mapping) else None
    values = metrics.items() if isinstance(metrics, Mapping) else ()
    return {str(name): value for name, value in values if isinstance(value, int | float)}


def first_metric(result: Any) -> str | None:
    """The name of a task's first metric; None where it has none."""
    return next((name for name in _metrics(result) if "_stderr" not in name), None)


def value_and_error(result: Any, name: str) -> tuple[float, float | None]:
    """A metric of a task and its standard error, if it is known; the error's name has ``_stderr`` before the filter."""
    metrics = _metrics(result)
    metric, comma, kind = name.partition(",")
    return metrics[name], metrics.get(f"{metric}_stderr{comma}{kind}")


def _shown(result: Any, name: str) -> str:
    """``0.313 ± 0.012``."""
    if name not in _metrics(result):
        return "–"
    value, error = value_and_error(result, name)
    return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")
