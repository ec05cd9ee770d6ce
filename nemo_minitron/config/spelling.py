"""What was meant by a setting that does not exist: the remedy that its fault names.

A name may be mistyped, be what the field calls a setting, stand in the wrong place, or belong to another stage.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from nemo_minitron.config.aliases import ALIASES, NOTES
from nemo_minitron.config.hints import item_class
from nemo_minitron.config.stages import STAGES, PipelineConfig

__all__ = ["instead_of", "nearest", "stages_with"]

#: Settings of a group that are listed where nothing is near.
_LISTED = 12
_BY_NAME = {name: (names[0], ends) for names, ends in ALIASES.items() for name in names}


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean x?`` if there is a similar name, else empty."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def instead_of(root: type[Any], path: Sequence[str | int]) -> str:
    """The remedy for a setting that ``root`` does not have, to follow the fault.

    Args:
        root: class of the whole configuration.
        path: of the setting; its groups exist.
    """
    groups = [str(part) for part in path[:-1] if not isinstance(part, int)]
    key = _plain(str(path[-1]))
    for prefix in [groups, []] if groups else [[]]:
        if (meant := _meant(root, prefix, key)) is not None:
            return meant
    if root is PipelineConfig and (kinds := _stages_meant(key)):
        return f"; it is a setting of stages ({kinds}): write it into the stage, or below defaults"
    own = _class_at(root, groups)
    fields = [field.name for field in dataclasses.fields(own)]
    if near := nearest(key, fields):
        return near
    if near := nearest(key, (name for names in _places(root) if len(names) == 1 for name in names)):
        return near
    if kinds := _stages_meant(key):
        return f"; it is a setting of {kinds}"
    if len(fields) <= _LISTED or not getattr(root, "STAGE", ""):
        return f"; settings: {', '.join(fields)}"
    return f"; `minitron config {root.STAGE}` prints all settings"


def stages_with(keys: Iterable[str]) -> list[str]:
    """The stages that have all these settings; those to which nothing is missing, if there are such."""
    keys = set(keys)
    fitting = [kind for kind, cls in STAGES.items() if keys <= {field.name for field in dataclasses.fields(cls)}]
    whole = [kind for kind in fitting if {*_needed(STAGES[kind])} <= keys]
    return whole or fitting


def _needed(cls: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(cls) if field.default == "???" and field.name != "output"]


def _meant(root: type[Any], groups: Sequence[str], key: str) -> str | None:
    """The setting, within some groups, that is called ``key`` in another place or by the field; None if none is."""
    first, ends = _BY_NAME.get(key, (key, ()))
    places = [place for place in _places(root) if place[: len(groups)] == tuple(groups)]
    for end in (*ends, key) if ends else (key,):
        parts = tuple(end.split("."))
        matches = [place for place in places if place[-len(parts) :] == parts]
        # within a group its name is said already: `parallel.tp` is `tensor` there
        if not matches and groups and parts[:-1] == tuple(groups[-len(parts) + 1 :]):
            matches = [place for place in places if place == (*groups, parts[-1])]
        if matches:
            shortest: tuple[str, ...] = min(matches, key=lambda match: len(match))
            place = ".".join(shortest)
            note = NOTES.get((first, end)) or NOTES.get((key, end))
            return f"; did you mean {place}?" + (f" ({note})" if note else "")
    return None


def _stages_meant(key: str) -> str:
    """The stages that have a setting of this name or meaning, in words; empty if none has."""
    _, ends = _BY_NAME.get(key, (key, ()))
    for end in (key, *ends):
        parts = tuple(end.split("."))
        held = {
            kind: [place for place in _places(cls) if place[-len(parts) :] == parts] for kind, cls in STAGES.items()
        }
        place = min((place for places in held.values() for place in places), key=lambda place: len(place), default=None)
        if place is not None:
            kinds = [kind for kind, places in held.items() if place in places]
            called = "" if place == (key,) else f" as {'.'.join(place)}"
            return ", ".join(kinds[:4]) + (", ..." if len(kinds) > 4 else "") + called
    return ""


def _plain(key: str) -> str:
    """``Hidden-Size`` and ``hiddenSize`` -> ``hidden_size``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key.strip()).replace("-", "_").lower()


def _places(root: Any) -> list[tuple[str, ...]]:
    """The path of every setting and group of a configuration, nearer ones first, without the entries of lists."""
    places: list[tuple[str, ...]] = []
    level: list[tuple[tuple[str, ...], type[Any]]] = [((), root)]
    while level:
        below: list[tuple[tuple[str, ...], type[Any]]] = []
        for path, cls in level:
            hints = typing.get_type_hints(cls)
            for field in dataclasses.fields(cls):
                places.append((*path, field.name))
                hint = hints[field.name]
                if dataclasses.is_dataclass(hint):
                    below.append(((*path, field.name), typing.cast("type[Any]", hint)))
        level = below
    return places


def _class_at(root: type[Any], groups: Sequence[str]) -> type[Any]:
    for group in groups:
        hint = typing.get_type_hints(root)[group]
        root = typing.cast("type[Any]", item_class(hint) or hint)
    return root
