"""What models are in size and speed, as far as it was measured, and why fewer tokens were counted than asked for."""

from __future__ import annotations

from typing import Any

from nemo_minitron.report.run import Model, Run, stage_of
from nemo_minitron.report.tables import Table, count, size
from nemo_minitron.runtime.files import size_of

__all__ = ["measure_table", "shortfall"]

_REASONS = {
    "filling": "{} are filling at the ends of blocks (data.packing=best_fit)",
    "beginnings": "{} begin a document, and nothing of it comes before them (data.documents=mask)",
    "masked": "{} are masked: questions, or pieces that are cut",
}


def measure_table(run: Run) -> Table | None:
    """Parameters, bytes on disk and measured speed of the teacher and of what was made of it; None without models.

    Speed is what ``evaluate`` measured in its pass over the held-out blocks, and what ``search`` measured of a shape. A
    column without any value is left out; nothing is estimated.
    """
    rows, roles = [], []
    for model in run.models:
        if model.role != "random":
            rows.append([*_size(model), *_speed(run, model)])
            roles.append(model.role)
    headings = [
        "model", "parameters", "size on disk", "forward pass, tokens/s", "prefill, ms", "decoding step, ms",
    ]  # fmt: skip
    used = [i for i, _ in enumerate(headings) if i < 2 or any(row[i] != "–" for row in rows)]
    if not rows:
        return None
    caption = "Size and speed, as far as they were measured"
    notes = []
    if 3 in used:
        notes.append("forward pass: of the evaluation, over all its blocks, once")
    if 4 in used or 5 in used:
        notes.append("prefill and decoding: of the search, for the shapes that it timed")
    return Table(
        "; ".join([caption, *notes]), [headings[i] for i in used], [[row[i] for i in used] for row in rows], roles
    )


def _size(model: Model) -> list[str]:
    there = model.path is not None and model.path.exists()
    return [model.name, count(model.parameters), size(size_of(model.path)) if there and model.path else "–"]


def _speed(run: Run, model: Model) -> list[str]:
    rates: list[float] = []
    stage = next((stage for stage in run.stages if stage.name == model.name), None)
    for _, evaluation in run.evaluations:
        for name in run.measured(stage, evaluation) if stage is not None else []:
            rate = evaluation["models"][name].get("tokens_per_second")
            rates += [float(rate)] if isinstance(rate, int | float) else []
    timed = _timed(run, model)
    times = [timed.get(name) for name in ("prefill", "decode")]
    shown = [f"{1000 * time:.2f}" if isinstance(time, int | float) else "–" for time in times]
    return [f"{rates[0]:,.0f}" if rates else "–", *shown]


def _timed(run: Run, model: Model) -> dict[str, Any]:
    """What a search measured of the shape of a model."""
    for name, search in run.searches:
        stage = next(stage for stage in run.stages if stage.name == name)
        unpruned = search.get("unpruned")
        start = next((m for m in run.models if m.path is not None and _is_at(run, m, stage.config.get("model"))), None)
        if start is None:
            continue
        if model.shape == start.shape and isinstance(unpruned, dict):
            return unpruned
        for candidate in search["candidates"]:
            sizes = {key: value for key, value in (candidate.get("sizes") or {}).items() if value is not None}
            if model.shape.to_dict() == {**start.shape.to_dict(), **sizes}:
                return dict(candidate)
    return {}


def _is_at(run: Run, model: Model, path: Any) -> bool:
    origin = stage_of(str(path), run)
    return origin is not None and origin.name == model.name


def shortfall(asked: int | None, evaluation: dict[str, Any]) -> str | None:
    """Why an evaluation counted fewer tokens than were asked for; None if it did not, or what was asked is not known.

    Args:
        asked: the setting ``tokens`` of the stage.
        evaluation: content of ``evaluation.json``; of earlier releases it does not say which labels do not count.
    """
    asked = evaluation.get("asked_tokens", asked)
    counted, blocks, length = (evaluation[name] for name in ("tokens", "blocks", "sequence_length"))
    if not isinstance(asked, int) or counted >= asked:
        return None
    reasons = []
    if (rest := asked - blocks * length) > 0:
        whole = asked // length
        reasons.append(
            f"{rest:,} do not fill a block of {length:,}"
            if blocks >= whole
            else f"the text gave {blocks:,} blocks of {length:,} tokens, and {whole:,} blocks were asked for"
        )
    uncounted = evaluation.get("uncounted")
    if isinstance(uncounted, dict):
        reasons += [_REASONS[why].format(f"{number:,}") for why, number in uncounted.items() if why in _REASONS]
    elif blocks * length > counted:
        reasons.append(
            f"{blocks * length - counted:,} labels do not count: filling, beginnings of documents, or masked"
        )
    return f"{asked:,} tokens were asked for and {counted:,} counted: {'; '.join(reasons)}."
