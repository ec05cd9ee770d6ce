"""``record.json`` of each output: its settings, inputs, metrics and time. An output with a record is complete."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.config import StageConfig
from nemo_minitron.jobs.contents import contents_of, results_of
from nemo_minitron.jobs.precision import with_values
from nemo_minitron.parsing import parse_json
from nemo_minitron.runtime.files import is_earlier, replace_file

__all__ = [
    "hashed_settings",
    "identity_of",
    "owner_of",
    "parents",
    "read_record",
    "record_path",
    "recorded",
    "write_record",
]


RECORD_VERSION = 1
_SEAL = "seal"
_KEYS = {"stage", "name", "hash", "config", "settings", "parents", "metrics", "seconds"}
#: Settings that change neither the result nor what it depends on. Paths count by what they hold (see ``parents``).
_NOT_HASHED = {"name", "output", "overwrite", "resume", "cache_dir"}
_NOT_HASHED_RUNTIME = {"threads", "timeout_minutes", "collective_timeout_minutes"}


def record_path(output: str | Path) -> Path:
    """The path of an output's record: inside a directory, beside a file."""
    output = Path(output)
    return output.with_name(output.name + ".record.json") if output.suffix == ".nemo" else output / "record.json"


def read_record(output: str | Path) -> dict[str, Any] | None:
    """The record of an output; None if there is no complete record, or a damaged one."""
    try:
        record = parse_json(record_path(output).read_text())
    except (OSError, ValueError):
        return None
    return record if _is_whole(record) else None


def _is_whole(record: Any) -> bool:
    """Whether a record has what its readers ask for, and is as it was written."""
    if isinstance(record, dict) and _SEAL in record and record[_SEAL] != _seal(record):
        return False
    if not isinstance(record, dict) or record.get("version") != RECORD_VERSION or not record.keys() >= _KEYS:
        return False
    files = record.get("files", {})
    return (
        all(isinstance(record[key], dict) for key in ("config", "settings", "parents", "metrics"))
        and all(isinstance(record[key], str) for key in ("stage", "hash"))
        and isinstance(record["seconds"], int | float)
        and isinstance(files, dict)
        and all(isinstance(entry, dict) and entry.keys() >= {"size", "sha256"} for entry in files.values())
        and all(isinstance(parent, dict) and parent.keys() >= {"path", "hash"} for parent in record["parents"].values())
    )


def _seal(record: dict[str, Any]) -> str:
    """A hash of a record without its seal: a flipped bit would make another figure of a figure."""
    return _digest({key: value for key, value in record.items() if key != _SEAL})


def owner_of(path: Path) -> Path | None:
    """The recorded output that ``path`` is, or lies in; None if it is of no such output."""
    owned = recorded(path)
    return None if owned is None else owned[0]


def recorded(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """:func:`owner_of` and its record."""
    path = path.absolute()
    read = ((place, read_record(place)) for place in (path, *path.parents))
    return next(((place, record) for place, record in read if record is not None), None)


def write_record(
    config: StageConfig,
    identity: dict[str, Any],
    metrics: dict[str, Any],
    seconds: float,
    *,
    peak_rss_bytes: int | None = None,
    peak_gpu_bytes: Sequence[int] | None = None,
    started: str | None = None,
    work: dict[str, float] | None = None,
    precision: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the record of an output, which marks the output as complete.

    Args:
        config: the stage's resolved configuration.
        identity: of the output, from :func:`identity_of`.
        metrics: JSON values that the stage's ``run`` returned.
        seconds: wall time.
        peak_rss_bytes: largest resident size of any of its processes.
        peak_gpu_bytes: of each process, the most that its tensors took of its GPU, 0 if it used none; None if that is
            not known, as of a stage whose work other processes do.
        started: ISO time.
        work: operations and bytes that it took, for estimates.
        precision: what was chosen where settings leave it to the suite (:func:`~nemo_minitron.jobs.precision.taken`);
            ``config`` states it too.

    Returns:
        The record: ``version, stage, name, hash, config, settings, parents, contents, metrics, files, started, seconds,
        peak_rss_bytes, host, work, ranks, gpus, peak_gpu_bytes, versions, seal``, and ``precision`` where it is given.
        Records of earlier releases have no ``contents, files, host, work, ranks, gpus, peak_gpu_bytes, seal``.
    """
    record = {
        "version": RECORD_VERSION,
        **identity,
        "name": config.name or config.STAGE,
        "config": _stated(config if precision is None else with_values(config, precision["taken"])),
        **({} if precision is None else {"precision": precision}),
        "metrics": metrics,
        "files": {} if config.REPEATS else contents_of(Path(config.output)),
        "started": started,
        "seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes,
        "host": socket.gethostname(),
        "work": work or {},
        **_devices(config, peak_gpu_bytes),
        "versions": _versions(),
    }
    record = json.loads(json.dumps(record, default=str))
    record[_SEAL] = _seal(record)
    path = record_path(config.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(record, indent=2) + "\n")
    return record


def identity_of(config: StageConfig) -> dict[str, Any]:
    """The identity of a stage's result: its settings and the content of its inputs.

    It does not depend on the paths of inputs and output, so that a moved run directory stays valid.

    Returns:
        ``stage, hash, settings, parents, contents``, as records keep them. The hash says how each input was made; the
        contents, which are not part of it, say what came of that, by the names of the inputs whose record knows it.
    """
    settings, inputs = hashed_settings(config), parents(config)
    hashes = {name: parent["hash"] for name, parent in inputs.items()}
    return {
        "stage": config.STAGE,
        "hash": _digest([config.STAGE, settings, hashes]),
        "settings": settings,
        "parents": inputs,
        "contents": _contents(config),
    }


def hashed_settings(config: StageConfig) -> dict[str, Any]:
    """The settings of a stage that its result depends on, without paths of inputs."""
    settings = {name: value for name, value in _settings(config).items() if name not in _NOT_HASHED}
    settings["runtime"] = {k: v for k, v in settings["runtime"].items() if k not in _NOT_HASHED_RUNTIME}
    if "data" in settings:
        settings["data"] = {k: v for k, v in settings["data"].items() if k not in _NOT_HASHED}
    for path in config.INPUTS:
        *sections, name = path.split(".")
        section = settings
        for part in sections:
            section = section.get(part, {})  # a group may have been added later, too
        if name not in section:
            continue  # added later, and at its default
        value = section[name]
        if isinstance(value, list):  # of named models
            section[name] = [{key: entry[key] for key in entry if key != "model"} for entry in value]
        else:
            section[name] = sorted(value) if isinstance(value, dict) else value is not None
    return settings


def _settings(value: Any) -> Any:
    """As ``dataclasses.asdict``, without the settings that were added later (``ADDED``) and are at their defaults.

    A setting that is left to the suite has the value that the suite takes (``settled()``).
    """
    if dataclasses.is_dataclass(value):
        added = getattr(value, "ADDED", ())
        settled = value.settled() if hasattr(value, "settled") else {}
        stated = {field: settled.get(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {
            field.name: _settings(setting)
            for field, setting in stated.items()
            if not (field.name in added and setting == _default(field))
        }
    if isinstance(value, list | tuple):
        return type(value)(_settings(entry) for entry in value)
    if isinstance(value, dict):
        return {key: _settings(entry) for key, entry in value.items()}
    return value


def _default(field: dataclasses.Field[Any]) -> Any:
    """The default of a setting, whichever way it is declared."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _stated(value: Any) -> Any:
    """As ``dataclasses.asdict``, with the values that the suite takes for settings that are left to it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        settled = value.settled() if hasattr(value, "settled") else {}
        fields = (field.name for field in dataclasses.fields(value))
        return {name: _stated(settled.get(name, getattr(value, name))) for name in fields}
    if isinstance(value, list | tuple):
        return type(value)(_stated(entry) for entry in value)
    return dict(value) if isinstance(value, dict) else value


def parents(config: StageConfig) -> dict[str, dict[str, str]]:
    """Each input of a stage as ``{field: {"path", "hash"}}``; the hash changes when the input is made differently."""
    own = Path(config.output).absolute()
    inputs = config.inputs()
    return {name: {"path": path, "hash": _identity(Path(path).absolute(), own)} for name, path in inputs.items()}


def _identity(path: Path, excluding: Path) -> str:
    """A hash of an input's content: from its record, its nested records, or the sizes and times of its files."""
    record = read_record(path)
    if record is not None:
        return record["hash"]
    for parent in path.parents:  # a part of a recorded output (distill's model directory)
        if (outer := read_record(parent)) is not None:
            return _digest([outer["hash"], str(path.relative_to(parent))])
    if path.is_dir():
        records = {
            p.parent.name: read_record(p.parent)
            for p in sorted(path.glob("*/record.json"))
            if p.parent != excluding and not is_earlier(p.parent)
        }
        if records:
            return _digest({name: record["hash"] for name, record in records.items() if record})
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and not p.is_relative_to(excluding)]
        return _digest([(str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in files])
    return _digest([path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else None)


def _contents(config: StageConfig) -> dict[str, str]:
    """For each input whose record names its files: a hash of their hashes."""
    hashes = {}
    for name, given in config.inputs().items():
        path = Path(given).absolute()
        if (owned := recorded(path)) is None:
            continue
        owner, record = owned
        results = results_of(record.get("files", {}))
        files = {file: sha for file, sha in results.items() if (owner / file).is_relative_to(path)}
        if files:
            hashes[name] = _digest(files)
    return hashes


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _devices(config: StageConfig, peak_gpu_bytes: Sequence[int] | None) -> dict[str, Any]:
    """Processes that ran at once, how many of them used a GPU, and the most that one took of its memory."""
    leads = config.RUNS_CHILD_STAGES or type(config).started is not StageConfig.started
    if peak_gpu_bytes is None or leads:
        return {"ranks": config.started, "gpus": None, "peak_gpu_bytes": None}
    gpus = sum(size > 0 for size in peak_gpu_bytes)
    return {"ranks": len(peak_gpu_bytes), "gpus": gpus, "peak_gpu_bytes": max(peak_gpu_bytes) if gpus else None}


def _versions() -> dict[str, str]:
    """Installed versions of the packages that the result depends on."""
    import platform
    from importlib import metadata

    packages = ("nemo-minitron", "nemo-toolkit", "nemo-run", "megatron-core", "torch", "transformers", "lightning")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
