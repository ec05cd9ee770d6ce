"""Settings of a precision that are left to the suite (``auto``): what a run takes, and that it stays with it.

The identity of an output has the setting as it was written, so a run does not count as another where a machine chose
otherwise. What was taken is in a file beside the logs while the stage runs, and in the record afterwards. A run that is
resumed keeps it: half a training in float32 would have states that its other half does not fit.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from nemo_minitron.config import StageConfig
from nemo_minitron.config.parts.checks import AUTO
from nemo_minitron.parsing import parse_json
from nemo_minitron.runtime.files import replace_file
from nemo_minitron.runtime.meeting import from_first_rank

__all__ = ["automatic", "settle", "taken", "values_here", "with_values"]

logger = logging.getLogger(__name__)

_FILE = "precision.json"
#: Names of the settings that can be left to the suite -> (float32, bfloat16).
_VALUES = {"precision": ("32", "bf16-mixed"), "dtype": ("float32", "bfloat16")}

C = TypeVar("C", bound=StageConfig)


def automatic(config: Any, place: str = "") -> Iterator[str]:
    """The settings of a configuration that are left to the suite, as dotted paths."""
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), f"{place}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from automatic(value, f"{path}.")
        elif value == AUTO and field.name in _VALUES:
            yield path


def settle(config: C, folder: Path, *, identity: str, resumes: bool) -> C:
    """The configuration with what this run takes in the place of ``auto``. Every rank calls it.

    Rank 0 chooses, by :func:`nemo_minitron.runtime.precision.choose`, and the others ask it.

    Args:
        config: of the stage.
        folder: of its logs, which keeps what was taken.
        identity: hash of the output's identity, as rank 0 knows it.
        resumes: rank 0 goes on with an output that is there already.
    """
    if not any(True for _ in automatic(config)):
        return config
    values = from_first_rank(lambda: json.dumps(values_here(config, folder, identity=identity, resumes=resumes)))
    return with_values(config, json.loads(values))


def values_here(config: StageConfig, folder: Path, *, identity: str, resumes: bool) -> dict[str, str]:
    """What :func:`settle` takes, by setting, as this process alone chooses it; it is kept in ``folder``."""
    paths = list(automatic(config))
    kept = _read(folder) if resumes else None
    if kept is None or kept["identity"] != identity or kept["taken"].keys() != set(paths):
        kept = _choose(paths, identity)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / _FILE, json.dumps(kept) + "\n")
    logger.info("%s: %s", ", ".join(f"{name}={value}" for name, value in kept["taken"].items()), kept["reason"])
    values: dict[str, str] = kept["taken"]
    return values


def taken(config: StageConfig, folder: Path, identity: str) -> dict[str, Any] | None:
    """What a run took, for its record: ``{"taken": {setting: value}, "reason": text}``; None where nothing was left
    to the suite.
    """
    if not any(True for _ in automatic(config)):
        return None
    kept = _read(folder)
    if kept is None or kept["identity"] != identity:
        return None
    return {"taken": kept["taken"], "reason": kept["reason"]}


def with_values(config: Any, values: dict[str, str]) -> Any:
    """A copy of a configuration with other values at dotted paths."""
    changed: dict[str, Any] = {}
    for path, value in values.items():
        name, _, below = path.partition(".")
        changed[name] = with_values(changed.get(name, getattr(config, name)), {below: value}) if below else value
    return dataclasses.replace(config, **changed)


def _choose(paths: list[str], identity: str) -> dict[str, Any]:
    from nemo_minitron.runtime.device import here
    from nemo_minitron.runtime.precision import choose

    choice = choose(here())
    values = {path: _VALUES[path.rpartition(".")[2]][choice.bfloat16] for path in paths}
    return {"identity": identity, "taken": values, "reason": choice.reason}


def _read(folder: Path) -> dict[str, Any] | None:
    """What an earlier run of the output took; None where that is not known."""
    try:
        kept = parse_json((folder / _FILE).read_text())
    except (OSError, ValueError):
        return None
    known = (
        isinstance(kept, dict) and {"identity", "taken", "reason"} <= kept.keys() and isinstance(kept["taken"], dict)
    )
    return kept if known else None
