"""The defaults of a pipeline: each holds in the stages that have the setting in its form.

``data`` of a distillation is text, that of an SFT conversations: ``defaults.data.sources`` holds in the one, and
``defaults.data.path`` in the other. A default that holds in no stage is a fault.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_minitron.config.hints import item_class
from nemo_minitron.config.spelling import instead_of
from nemo_minitron.config.stages import STAGES

__all__ = ["Path", "share_out"]

#: Of a setting within the defaults: ``("data", "sources")``.
Path = tuple[str, ...]

_FITS, _OTHER_FORM, _ABSENT = "fits", "other form", "absent"


def share_out(
    defaults: Mapping[str, Any], classes: Sequence[type[Any]]
) -> tuple[list[tuple[dict[str, Any], set[Path]]], dict[Path, str]]:
    """The defaults of each stage.

    A value of a form that no stage takes goes to those that have the setting, whose reader then says what is wrong.

    Args:
        defaults: as the file has them.
        classes: of the stages.

    Returns:
        Of each stage its defaults, and the settings that do not hold in it though it has their group; and what is
        wrong with settings that hold in no stage.
    """
    taken: list[dict[str, Any]] = [{} for _ in classes]
    left_out: list[set[Path]] = [set() for _ in classes]
    faults: dict[Path, str] = {}
    for path, value in _leaves(defaults, ()):
        forms = [_form(cls, path, value) for cls in classes]
        wanted = _FITS if _FITS in forms else _OTHER_FORM
        if wanted not in forms:
            place, remedy = _missing(path, classes)
            faults[place] = f": no stage of the pipeline has this setting{remedy}"
        for number, (cls, form) in enumerate(zip(classes, forms, strict=True)):
            if form == wanted:
                _put(taken[number], path, value)
            elif path[0] in _fields(cls):
                left_out[number].add(path)
    return list(zip(taken, left_out, strict=True)), faults


def _leaves(values: Mapping[Any, Any], path: Path) -> Iterator[tuple[Path, Any]]:
    for key, value in values.items():
        here = (*path, str(key))
        if isinstance(value, dict) and value:
            yield from _leaves(value, here)
        else:
            yield here, value


def _form(cls: type[Any], path: Path, value: Any) -> str:
    """Whether a stage has a setting, and in the form of this value."""
    for depth, name in enumerate(path, 1):
        if name not in _fields(cls):
            return _ABSENT
        hint = typing.get_type_hints(cls)[name]
        if not dataclasses.is_dataclass(hint):
            rest = path[depth:]
            for key in reversed(rest):
                value = {key: value}  # an entry of a mapping
            return _FITS if _takes(cls, name, hint, value) else _OTHER_FORM
        cls = typing.cast("type[Any]", hint)
    fits = value == {} or (isinstance(value, str) and hasattr(cls, "TEXT"))
    return _FITS if fits else _OTHER_FORM


def _takes(cls: type[Any], name: str, hint: Any, value: Any) -> bool:
    if item_class(hint) is not None:
        return isinstance(value, list)
    node = OmegaConf.structured(cls)
    OmegaConf.set_readonly(node, False)  # that of a frozen dataclass is
    try:
        node[name] = value
    except (OmegaConfBaseException, ValueError, TypeError):
        return False
    return True


def _missing(path: Path, classes: Sequence[type[Any]]) -> tuple[Path, str]:
    """The part of a path that no stage has, and a remedy."""
    for length in range(1, len(path) + 1):
        holders = [cls for cls in classes if _form(cls, path[:length], {}) != _ABSENT]
        if not holders:
            break
    place = path[:length]
    having = [cls for cls in classes if length == 1 or _form(cls, place[:-1], {}) != _ABSENT]
    remedies = [instead_of(cls, place) for cls in having]
    if length == 1 and any(place[0] in _fields(cls) for cls in STAGES.values()):
        kinds = [kind for kind, cls in STAGES.items() if place[0] in _fields(cls)]
        return place, f" (it is one of {', '.join(kinds[:4])}{', ...' if len(kinds) > 4 else ''}); leave it out"
    return place, next((remedy for remedy in remedies if "did you mean" in remedy), remedies[0] if remedies else "")


def _put(values: dict[str, Any], path: Path, value: Any) -> None:
    for name in path[:-1]:
        values = values.setdefault(name, {})
    values[path[-1]] = value


def _fields(cls: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}
