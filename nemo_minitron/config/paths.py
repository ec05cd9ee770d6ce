"""The settings that are paths, and a configuration with every path expanded, or made absolute.

Each dataclass names its own in ``PATHS``; a stage's inputs (``INPUTS``) are paths too. A setting may hold one path, a
list of them, or a mapping to them.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from nemo_minitron.config.hub import cached_model
from nemo_minitron.config.stages.base import StageConfig

__all__ = ["absolute", "expanded", "paths_of", "read_paths"]

C = TypeVar("C")

_VARIABLE = re.compile(r"\$([A-Za-z_]\w*)")

#: Paths that a stage writes; all others are read.
_WRITTEN = ("output", "cache_dir")

#: Settings that are checkpoints or hold them.
_CHECKPOINTS = frozenset(("attribute_model", "base", "model", "models", "reference", "source", "student", "teacher"))


def paths_of(config: Any) -> dict[str, str]:
    """Every path of a configuration by its setting, such as ``data.sources[0].path``."""
    paths: dict[str, str] = {}

    def note(setting: str, path: str) -> str:
        paths[setting] = path
        return path

    _mapped(config, note, "")
    return paths


def absolute(config: C) -> C:
    """The configuration with every path made absolute, relative to this process's directory."""
    result: C = _mapped(config, lambda _, path: str(Path(path).absolute()), "")
    return result


def expanded(config: C, fault: Callable[[str, str], None]) -> C:
    """The configuration with ``~`` and ``$NAME`` in every path replaced, as a shell would.

    A checkpoint that is named ``org/name``, and is in the cache of the Hugging Face Hub, becomes the path of its
    snapshot there. An output that is a symbolic link becomes the path that it leads to: outputs are renamed and
    replaced, and the link stays.

    Args:
        config: as it was read, interpolations (``${...}``) resolved.
        fault: called with a setting and what is wrong with its path, which then stays as it is.
    """

    def change(setting: str, path: str) -> str:
        unset = [name for name in dict.fromkeys(_VARIABLE.findall(path)) if not os.environ.get(name)]
        if unset:
            are = "environment variable {} is" if len(unset) == 1 else "environment variables {} are"
            names = are.format(", ".join(unset))
            fault(setting, f"={path}: the {names} not set, or empty; set it, or write the directory out")
            return path
        result = os.path.expanduser(_VARIABLE.sub(lambda match: os.environ[match[1]], path))  # noqa: PTH111
        if result.startswith("~"):
            user = result.partition("/")[0]
            fault(
                setting,
                f"={path}: there is no user of the name {user[1:]}; write the directory out (./{user} is a "
                "directory of that name)",
            )
            return path
        if setting.rpartition(".")[2] in _WRITTEN and Path(result).is_symlink():
            return str(Path(result).resolve())
        return _cached(setting, result)

    result: C = _mapped(config, change, "")
    return result


def _cached(setting: str, path: str) -> str:
    """The snapshot of a model that is named as the Hub names it; a path that is there goes before."""
    if _CHECKPOINTS.isdisjoint(re.split(r"[.\[]", setting)) or Path(path).exists():
        return path
    return str(cached_model(path) or path)


def read_paths(config: StageConfig) -> dict[str, str]:
    """The paths that a stage reads, by setting: inputs, text, tasks. Patterns are not expanded."""
    inputs = config.inputs()
    declared = set(type(config).INPUTS)
    others = {
        setting: path
        for setting, path in paths_of(config).items()
        if setting.rpartition(".")[2] not in _WRITTEN and not any(_within(setting, name) for name in declared)
    }
    return {**inputs, **others}


def _within(setting: str, name: str) -> bool:
    return setting == name or setting.startswith((f"{name}.", f"{name}["))


def _mapped(config: Any, change: Callable[[str, str], str], prefix: str) -> Any:
    """A copy of a dataclass with ``change(setting, path)`` in place of each path."""
    names = {*getattr(config, "PATHS", ()), *(n for n in getattr(config, "INPUTS", ()) if "." not in n)}
    is_path = getattr(config, "is_path", lambda name, value: True)
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, setting = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            changed[field.name] = _mapped(value, change, f"{setting}.")
        elif isinstance(value, list) and any(dataclasses.is_dataclass(item) for item in value):
            changed[field.name] = [_mapped(item, change, f"{setting}[{n}].") for n, item in enumerate(value)]
        elif field.name not in names:
            continue
        elif isinstance(value, str):
            changed[field.name] = change(setting, value) if is_path(field.name, value) else value
        elif isinstance(value, list):
            changed[field.name] = [
                change(f"{setting}[{n}]", item) if is_path(field.name, item) else item for n, item in enumerate(value)
            ]
        elif isinstance(value, dict):
            changed[field.name] = {key: change(f"{setting}.{key}", item) for key, item in value.items()}
    return dataclasses.replace(config, **changed)
