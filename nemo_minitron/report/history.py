"""What was done to a model since it was imported, as its lineage says, and a title that says it."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_minitron import axes
from nemo_minitron.config import STAGES
from nemo_minitron.errors import ShapeError
from nemo_minitron.report.tables import count
from nemo_minitron.shape import ModelShape

__all__ = ["STAGES_BY_LINEAGE", "Change", "changes_of", "first_parameters", "joined", "title_of"]

#: What lineages call a stage that they do not call by its name.
STAGES_BY_LINEAGE = {"distilled": "distill", "corrected": "correct"}


@dataclass(frozen=True)
class Change:
    """Something that was done to a model.

    Attributes:
        stage: name of the stage that did it.
        words: what it did, as a past participle.
    """

    stage: str
    words: str


def changes_of(lineage: Mapping[str, Any]) -> list[Change]:
    """What was done, first things first; stages that change no model (import, export) are left out."""
    changes: list[Change] = []
    for parent in _parents(lineage):
        changes += changes_of(parent.get("lineage") or {})
    made_by = lineage.get("made_by")
    if isinstance(made_by, str):
        changes += _change(made_by, lineage)
    for name, facts in lineage.items():
        if isinstance(facts, Mapping):
            changes += _change(STAGES_BY_LINEAGE.get(name, name), facts)
    return changes


def _parents(lineage: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The model that a model was made from: none, or one."""
    parents = lineage.get("parents")
    values = parents.values() if isinstance(parents, Mapping) else ()
    return [parent for parent in values if isinstance(parent, Mapping)][:1]


def _change(stage: str, facts: Mapping[str, Any]) -> list[Change]:
    kind = STAGES.get(stage)
    if kind is None or not kind.DONE:
        return []
    if stage == "prune" and facts.get("method") == "random":
        return [Change(stage, f"{kind.DONE} at random")]
    fields = [name for _, name, _, _ in string.Formatter().parse(kind.DONE) if name]
    values = {name: _shown(facts.get(name, getattr(kind, name, ""))) for name in fields}
    return [Change(stage, kind.DONE.format(**values))]


def _shown(value: Any) -> str:
    """``rpo_bwd_kl`` -> ``RPO``: the name of a loss without its variant."""
    return str(value).partition("_")[0].upper()


def first_parameters(lineage: Mapping[str, Any], table: axes.Family) -> int | None:
    """Parameters of the first model of a lineage that has its sizes; None where none has."""
    for parent in _parents(lineage):
        if (number := first_parameters(parent.get("lineage") or {}, table)) is not None:
            return number
        try:
            return axes.parameter_count(table, ModelShape.from_dict(parent["shape"]))
        except (KeyError, TypeError, ShapeError):
            return None
    return None


def title_of(name: str, changes: list[Change], before: int | None, after: int) -> str:
    """``SmolLM2-135M, pruned from 134.5 M to 93.4 M parameters and distilled``.

    Args:
        name: of the model that it was made from.
        changes: what was done.
        before, after: parameters of that model, if known, and of what was made from it.
    """
    words = list(dict.fromkeys(change.words for change in changes))
    if not words:
        return f"{name}, {count(after)} parameters"
    sizes = f" from {count(before)}" if before is not None and before != after else ""
    cut = next((number for number, word in enumerate(words) if word.startswith("pruned")), None)
    if cut is not None:
        words[cut] += f"{sizes} to {count(after)} parameters"
    return f"{name}, {joined(words)}"


def joined(words: list[str]) -> str:
    """``a, b and c``."""
    return " and ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)
