"""Finished outputs of other settings, kept beside the present one under their identity.

``<name>@<first twelve digits of the record's hash>``: a stage whose settings or inputs have changed is made anew, and
what it made before comes back, without any work, when they are changed back. So in a pipeline; a stage that is started
by itself refuses to go on with what others made (:func:`check_goes_on`).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from nemo_minitron.config import StageConfig
from nemo_minitron.errors import ConfigError
from nemo_minitron.jobs import slurm_environment
from nemo_minitron.jobs.folder import begun
from nemo_minitron.jobs.records import config_hash, hashed_settings, identity_of, read_record, record_path
from nemo_minitron.runtime.files import is_earlier

__all__ = [
    "began_before",
    "check_goes_on",
    "earlier_outputs",
    "goes_on_faults",
    "is_kept",
    "keep",
    "recall",
    "recall_begun",
    "stage_state",
]

_DIGITS = 12


def stage_state(config: StageConfig) -> tuple[str, list[str]]:
    """How far a stage is.

    Returns:
        "done"; "changed" with what differs from the record; "unfinished" (an output without a record, or of a stage
        that is always made anew); "begun" (one that could be gone on with, if it had not been begun with other
        settings, and which); or "new".
    """
    record = read_record(config.output)
    if config.REPEATS:
        return ("unfinished" if Path(config.output).exists() else "new"), []
    if not Path(config.output).exists():
        return ("new", []) if record is None else ("changed", ["the output is gone"])
    if record is not None:
        reasons = _differences(config, record)
        return ("changed", list(reasons.values())) if reasons else ("done", [])
    reasons = _differences(config, begun(config)) if getattr(config, "resume", False) else {}
    return ("begun", list(reasons.values())) if reasons else ("unfinished", [])


def check_goes_on(config: StageConfig) -> None:
    """Whether a training may go on with what its output holds: see :func:`goes_on_faults`.

    Raises:
        ConfigError: with every setting and input that is another now.
    """
    if faults := goes_on_faults(config):
        raise ConfigError(faults)


def goes_on_faults(config: StageConfig) -> list[str]:
    """Why a training may not go on with what its output holds: it may only with what the same training began.

    Other settings would train on from the old checkpoints, or find that nothing is left to train, and the record would
    say that they had made the model. What changes no number of a step but by rounding may change (``GOES_ON_WITH``).
    """
    if config.GOES_ON_WITH is None or config.overwrite or not Path(config.output).exists():
        return []
    record = read_record(config.output)
    faults = [
        f"{config.output} was {'begun' if record is None else 'made'} with other settings: {reason}"
        for key, reason in _differences(config, record or begun(config)).items()
        if not any(key == free or key.startswith(f"{free}.") for free in config.GOES_ON_WITH)
    ]
    if faults:
        faults[-1] += "; choose another output, or make this one anew with --overwrite (overwrite=true)"
    return faults


def began_before(config: StageConfig) -> bool:
    """Whether this is a job that Slurm queued again, and what is there is what it began: to be gone on with.

    Where the job was told to overwrite, it has done so.
    """
    return slurm_environment.requeued() and getattr(config, "resume", False) and stage_state(config)[0] == "unfinished"


def _differences(config: StageConfig, before: Mapping[str, Any] | None) -> dict[str, str]:
    """What has changed since an :func:`~nemo_minitron.jobs.records.identity_of`, by setting or input.

    Empty if nothing has, or nothing is known. A setting that did not exist then had its default's effect.
    """
    present = identity_of(config)
    if before is None or before["hash"] == present["hash"]:
        return {}
    if before["stage"] != present["stage"]:
        return {"stage": f"stage: {before['stage']} then, {present['stage']} now"}
    then, now = _flat(_filled(before["settings"], hashed_settings(type(config)()))), _flat(present["settings"])
    found = {
        key: f"{key}: {then.get(key)} then, {now.get(key)} now"
        for key in sorted({*then, *now})
        if not _same(then.get(key), now.get(key))
    }
    for name, parent in present["parents"].items():
        known = before["parents"].get(name)
        if known is None or known["hash"] != parent["hash"]:
            found[name] = f"{name}: {parent['path']} has changed"
    return found


def _same(then: object, now: object) -> bool:
    """Whether two settings are equal; a path may be absolute in one of them, as those of a cluster's jobs are."""
    if then == now:
        return True
    if not isinstance(then, str) or not isinstance(now, str):
        return False
    whole, part = sorted((PurePath(then), PurePath(now)), key=lambda path: not path.is_absolute())
    parts = part.parts
    return whole.is_absolute() and not part.is_absolute() and bool(parts) and whole.parts[-len(parts) :] == parts


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
    made = read_record(output) or begun(config)
    if made is None or not output.exists():
        return None
    identity = made["hash"]
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


def _filled(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, and the defaults of those that are not there."""
    found = {**defaults, **settings}
    for key, value in settings.items():
        if isinstance(value, dict) and isinstance(defaults.get(key), dict):
            found[key] = _filled(value, defaults[key])
    return found


def _flat(value: object, path: str = "") -> dict[str, object]:
    """Leaves of nested mappings and lists by dotted path."""
    if isinstance(value, dict | list) and value:
        found: dict[str, object] = {}
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            found |= _flat(entry, f"{path}.{key}" if path else str(key))
        return found
    return {path: value}
