"""Functions that the packs share: JSON lines from an archive, and the configuration of a task over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nemo_minitron.errors import DataError
from nemo_minitron.parsing import parse_json

__all__ = ["json_lines", "json_value", "task_config"]

VERSION = 1.0  # of prompts and metrics; results of different versions are not to be compared


def json_value(content: bytes, where: str) -> Any:
    """A JSON file.

    Raises:
        DataError: if it is not valid JSON.
    """
    try:
        return parse_json(content.decode("utf-8"))
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); the package is not the pinned one") from None


def json_lines(content: bytes, where: str, fields: dict[str, type]) -> list[dict[str, Any]]:
    """Lines of JSON objects that have these fields of these types.

    Raises:
        DataError: with every bad line, or if there are no lines at all.
    """
    try:
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error})") from None
    records: list[dict[str, Any]] = []
    bad: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            bad.append(f"line {number}: not JSON ({error})")
            continue
        bad += [f"line {number}: {fault}" for fault in field_faults(record, fields)]
        records.append(record)
    if bad:
        raise DataError("\n".join([f"{where}: {len(bad)} faults:", *(f"  - {fault}" for fault in bad[:20])]))
    if not records:
        raise DataError(f"{where}: no lines; the package is not the pinned one")
    return records


def field_faults(record: Any, fields: dict[str, type]) -> list[str]:
    """What a record lacks."""
    if not isinstance(record, dict):
        return [f"{type(record).__name__}, not an object"]
    return [
        f"{name} is {type(record[name]).__name__}, not {kind.__name__}" if name in record else f"no {name}"
        for name, kind in fields.items()
        if not isinstance(record.get(name), kind)
    ]


def task_config(
    name: str,
    documents: Sequence[dict[str, Any]],
    *,
    doc_to_text: Callable[[dict[str, Any]], str],
    doc_to_target: Callable[[dict[str, Any]], str],
    process_results: Callable[[dict[str, Any], list[str]], dict[str, Any]],
    metrics: dict[str, str | Callable[[list[Any]], float]],
    until: Sequence[str],
    max_new_tokens: int,
) -> dict[str, Any]:
    """Configuration of an ``lm_eval`` task of greedy answers over documents in memory, without examples.

    Args:
        name: of the task.
        documents: records without nesting, all with the same keys.
        doc_to_text: the prompt.
        doc_to_target: a right answer.
        process_results: metrics of one answer.
        metrics: how each metric's values are aggregated; higher is better for all of them.
        until: texts that end an answer.
        max_new_tokens: longest answer.
    """
    from datasets import Dataset

    data = Dataset.from_list(list(documents))
    return {
        "task": name,
        "custom_dataset": lambda: {"test": data},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": doc_to_text,
        "doc_to_target": doc_to_target,
        "process_results": process_results,
        "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": aggregation, "higher_is_better": True}
            for metric, aggregation in metrics.items()
        ],
        "generation_kwargs": {"until": list(until), "do_sample": False, "max_gen_toks": max_new_tokens},
        "metadata": {"version": VERSION},
    }
