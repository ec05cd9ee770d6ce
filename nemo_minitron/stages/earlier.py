"""Finished outputs of other settings, kept beside the present one under their identity.

``<name>@<first twelve digits of the record's hash>``: a stage whose settings or inputs have changed is made anew, and
what it made before comes back, without any work, when they are changed back.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from nemo_minitron.config import StageConfig
from nemo_minitron.errors import ConfigError
from nemo_minitron.runtime.files import is_earlier
from nemo_minitron.stages.base import config_hash, hashed_settings, parents, read_record, record_path
from nemo_minitron.stages.execute import begun

__all__ = ["earlier_outputs", "is_kept", "keep", "recall", "recall_begun", "stage_state"]

_DIGITS = 12


def stage_state(config: StageConfig) -> tuple[str, list[str]]:
    """How far a stage is.

    Returns:
        "done"; "changed" with what differs from the record; "unfinished" (an output without a record); "begun" (one
        that could be gone on with, if it had not been begun with other settings); or "new".
    """
    record = read_record(config.output)
    if record is None:
        if not Path(config.output).exists():
            return "new", []
        if getattr(config, "resume", False) and begun(config) not in (None, config_hash(config)):
            return "begun", ["those that it was begun with"]
        return "unfinished", []
    if record["hash"] == config_hash(config) and Path(config.output).exists():
        return "done", []
    then, now = _flat(record["settings"]), _flat(hashed_settings(config))
    reasons = [
        f"{key}: {then.get(key)} then, {now.get(key)} now"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    ]
    for name, parent in parents(config).items():
        before = record["parents"].get(name)
        if before is None or before["hash"] != parent["hash"]:
            reasons.append(f"{name}: {parent['path']} has changed")
    return "changed", reasons or ["the stage itself"]


def is_kept(config: StageConfig) -> bool:
    """Whether an output of just these settings and inputs lies beside the present one."""
    wanted = config_hash(config)
    return _lies_at(_place(config.output, wanted), wanted)


def keep(config: StageConfig) -> Path | None:
    """Move an output aside, under its identity. Call it on one rank, before the stage starts.

    Returns:
        Where it lies now; None if there was none, or none whose identity is known.

    Raises:
        ConfigError: if something else lies there.
    """
    output = Path(config.output)
    record = read_record(output)
    identity = record["hash"] if record is not None else begun(config)
    if identity is None or not output.exists():
        return None
    place = _place(output, identity)
    if _lies_at(place, identity):  # the same thing, made twice
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    elif place.exists():
        raise ConfigError(f"{place} is in the way of an output that is to be kept there, and is not whole; remove it")
    _move(output, place)
    return place


def recall(config: StageConfig) -> bool:
    """Put an earlier output of just these settings and inputs in the present one's place, which is kept in turn.

    One of unknown identity makes room as ``.<name>.replaced``, as where a stage is made anew.

    Returns:
        Whether there was one.

    Raises:
        ConfigError: as :func:`keep`.
    """
    if not is_kept(config):
        return False
    output = Path(config.output)
    if keep(config) is None and output.exists():
        begun = output.with_name(f".{output.name}.replaced")
        shutil.rmtree(begun, ignore_errors=True)
        output.rename(begun)
    _move(_place(config.output, config_hash(config)), Path(config.output))
    return True


def recall_begun(config: StageConfig) -> None:
    """Put what was begun with just these settings, and kept, in its place again, to be gone on with."""
    place = _place(config.output, config_hash(config))
    if getattr(config, "resume", False) and place.exists() and not Path(config.output).exists():
        place.rename(config.output)


def earlier_outputs(output: str | Path) -> list[Path]:
    """What is kept of an output's earlier settings."""
    output = Path(output)
    stem, suffix = _parts(output)
    return sorted(path for path in output.parent.glob(f"{_escaped(stem)}@*{suffix}") if is_earlier(path))


def _lies_at(place: Path, identity: str) -> bool:
    record = read_record(place)
    return record is not None and record["hash"] == identity and place.exists()


def _place(output: str | Path, identity: str) -> Path:
    output = Path(output)
    stem, suffix = _parts(output)
    return output.with_name(f"{stem}@{identity[:_DIGITS]}{suffix}")


def _parts(output: Path) -> tuple[str, str]:
    """An output's name without, and its, suffix: only a ``.nemo`` file has one."""
    suffix = ".nemo" if output.suffix == ".nemo" else ""
    return output.name.removesuffix(suffix), suffix


def _move(source: Path, target: Path) -> None:
    """Rename an output, and the record that lies beside a file. The record goes last: without it nothing is whole."""
    source.rename(target)
    if record_path(source).exists():
        record_path(source).rename(record_path(target))


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _flat(value: object, path: str = "") -> dict[str, object]:
    """Leaves of nested mappings and lists by dotted path."""
    if isinstance(value, dict | list) and value:
        found: dict[str, object] = {}
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            found |= _flat(entry, f"{path}.{key}" if path else str(key))
        return found
    return {path: value}
