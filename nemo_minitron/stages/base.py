"""What all stages share: the plan that ``--dry-run`` prints, outputs written aside, and the record beside each output.

A stage is a module ``nemo_minitron.stages.<name>`` with two functions::

    def plan(config: ScoreConfig) -> StagePlan: ...      # cheap: no torch, nothing written
    def run(config: ScoreConfig) -> dict[str, Any]: ...  # on every rank; returns the metrics of the record

``run`` writes its output through :func:`stage_output`, or through a checkpoint door that also writes aside; the process
that started the stage writes the record (:func:`write_record`) once every rank has ended well. So an output with a
record is whole.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from nemo_minitron.axes import Family, family
from nemo_minitron.config import StageConfig
from nemo_minitron.errors import CheckpointError, ConfigError, MinitronError, PreemptedError
from nemo_minitron.runtime.files import is_earlier, replace_file
from nemo_minitron.shape import Architecture, ModelShape

__all__ = [
    "PlannedPath",
    "StagePlan",
    "config_hash",
    "human_bytes",
    "human_count",
    "identity_of",
    "own_output",
    "peek_architecture",
    "peek_family",
    "peek_shape",
    "read_record",
    "record_path",
    "set_aside",
    "stage_output",
    "write_record",
]

T = TypeVar("T")

RECORD_VERSION = 1
#: Left in every directory that :func:`stage_output` finishes: like a record or ``minitron.json``, it says: ours.
MARKER = ".minitron-output"
#: Settings that change neither the result nor what it depends on. Paths count by what they hold (see ``parents``).
_NOT_HASHED = {"name", "output", "overwrite", "resume", "cache_dir"}
_NOT_HASHED_RUNTIME = {"threads", "timeout_minutes", "collective_timeout_minutes"}


@dataclass(frozen=True)
class PlannedPath:
    """A path that a stage reads or writes, and what it is ("teacher checkpoint")."""

    path: str
    what: str

    def exists(self) -> bool:
        """Whether it is there now."""
        return Path(self.path).exists()

    def comes_from(self, produced: set[str]) -> bool:
        """Whether it is, lies in, or holds one of the paths that earlier stages write."""
        own = Path(self.path).absolute()
        made = [Path(path).absolute() for path in produced]
        return any(own.is_relative_to(path) or path.is_relative_to(own) for path in made)

    def size(self) -> int | None:
        """Bytes on disk, or None where it does not exist."""
        path = Path(self.path)
        if path.is_dir():
            return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return path.stat().st_size if path.exists() else None


@dataclass
class StagePlan:
    """What a stage would do.

    Attributes:
        stage: its name.
        reads: inputs; one that neither exists nor is written by an earlier stage of a pipeline is reported as a fault.
        writes: outputs.
        costs: rows of the table, name -> formatted value ("parameters" -> "134.5 M", "tokens", "FLOPs", "memory", ...).
        notes: one-line remarks.
        faults: what would make the stage fail, one line each.
    """

    stage: str
    reads: list[PlannedPath] = field(default_factory=list)
    writes: list[PlannedPath] = field(default_factory=list)
    costs: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def missing_reads(self, produced: set[str]) -> list[str]:
        """Faults of inputs that are not there and that no earlier stage, writing the ``produced`` paths, provides."""
        return [
            f"{item.what}: {item.path} does not exist"
            for item in self.reads
            if not item.exists() and not item.comes_from(produced)
        ]


def human_bytes(count: float) -> str:
    """``1536`` -> ``"1.5 KiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def human_count(count: float) -> str:
    """``134515008`` -> ``"134.5 M"``."""
    for unit in ("", " k", " M", " G", " T", " P"):
        if count < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f} E"


def peek_shape(checkpoint: str | Path) -> ModelShape | None:
    """The shape that a checkpoint's ``minitron.json`` states, without opening the weights; None if there is none.

    Raises:
        CheckpointError: if the file is there and cannot be read.
    """
    return _peek(checkpoint, lambda content: ModelShape.from_dict(content["shape"]))


def peek_family(checkpoint: str | Path) -> Family:
    """The family that a checkpoint's ``minitron.json`` states, where :func:`peek_shape` finds a shape.

    Raises:
        CheckpointError: if the file is missing or cannot be read.
    """
    found = _peek(checkpoint, lambda content: family(content["architecture"]["family"]))
    if found is None:
        raise CheckpointError(f"{checkpoint}: has no minitron.json; open the checkpoint to know its family")
    return found


def peek_architecture(checkpoint: str | Path) -> Architecture | None:
    """The constants that a checkpoint's ``minitron.json`` states, or None where there is none yet.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    return _peek(checkpoint, lambda content: Architecture(**content["architecture"]))


def _peek(checkpoint: str | Path, read: Callable[[Any], T]) -> T | None:
    path = Path(checkpoint) / "minitron.json"
    if not path.is_file():
        return None
    try:
        return read(json.loads(path.read_text()))
    except (json.JSONDecodeError, KeyError, TypeError, MinitronError) as error:
        raise CheckpointError(f"{path}: not a readable model record ({error}); write the checkpoint again") from error


def _replaceable(path: Path) -> bool:
    """Whether ``path`` is an output of ours (or nothing), so that ``overwrite`` may remove it."""
    if path.is_dir() and not path.is_symlink():
        marks = (MARKER, "record.json", "minitron.json")
        return not any(path.iterdir()) or any((path / mark).exists() for mark in marks)
    return path.is_file()


def check_output(path: str | Path, overwrite: bool) -> Path:
    """The path itself, if a stage may write there.

    Raises:
        ConfigError: if something is there and ``overwrite`` is off, or it was not written by this suite.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        if path.is_dir() and not any(path.iterdir()):
            return path
        if not overwrite:
            raise ConfigError(f"output: {path} already exists; choose another output or pass --overwrite")
        if not _replaceable(path):
            raise ConfigError(
                f"output: {path} was not written by minitron and is not overwritten; remove it or choose another output"
            )
    return path


@contextmanager
def stage_output(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Write a stage's output directory aside and put it in place only when the block ends without an error.

    Call it on one rank only. Write below the yielded temporary sibling. An error removes it and leaves an
    earlier output untouched; a kill leaves the temporary directory (``.<name>.partial-*``), no half-written output.

    Args:
        path: final directory.
        overwrite: replace an earlier output of this suite.

    Yields:
        An empty directory beside ``path``.

    Raises:
        ConfigError: see :func:`check_output`; raised before anything is written.
        MinitronError: if the disk is full.
    """
    path = check_output(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    aside = path.parent / f".{path.name}.partial-{uuid.uuid4().hex[:8]}"
    aside.mkdir()
    try:
        yield aside
        (aside / MARKER).touch()
        replaced = None
        if path.exists():
            replaced = aside.with_name(aside.name.replace(".partial-", ".partial-old-"))
            path.rename(replaced)
        aside.rename(path)
        if replaced is not None:
            shutil.rmtree(replaced)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise MinitronError(
                f"{path.parent}: no space left on the device; free some and run the stage again"
            ) from error
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def set_aside(config: StageConfig) -> Iterator[None]:
    """Around a stage that can go on from what its output holds (it has a ``resume``), and is to make that anew.

    This is all there is to ``overwrite`` of such a stage: it does not look at it itself.

    What is there is moved to ``.<name>.replaced``, and removed when the block ends well. What a stage refuses costs
    nothing: the old output comes back. A stage that fails otherwise, or is killed, can be gone on with; the old
    output stays beside it until then.

    Raises:
        ConfigError: if what is there was not written by this suite.
    """
    path = Path(config.output)
    old = path.with_name(f".{path.name}.replaced")
    resumes = hasattr(config, "resume")  # also where it is off: other stages replace their output by stage_output
    moved = resumes and config.overwrite and path.is_dir() and any(path.iterdir())
    if moved:
        if not any((path / part).exists() for part in ("checkpoints", "metrics.jsonl")):
            check_output(path, overwrite=True)
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    try:
        yield
    except PreemptedError:
        raise
    except MinitronError:
        if moved:
            shutil.rmtree(path, ignore_errors=True)
            old.rename(path)
        raise
    if resumes:
        shutil.rmtree(old, ignore_errors=True)


def own_output(config: StageConfig) -> Path:
    """The output directory of a stage that resumes, there and marked as ours. One rank calls it.

    ``overwrite`` is no matter of the stage: :func:`set_aside` has emptied the place.

    Raises:
        ConfigError: for a directory that is not ours, or for any that is there where ``resume`` is off.
    """
    output = Path(config.output)
    if not ((output / MARKER).exists() and getattr(config, "resume", False)):
        check_output(output, overwrite=False)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).touch()
    return output


def record_path(output: str | Path) -> Path:
    """Where the record of an output lies: inside a directory, beside a file."""
    output = Path(output)
    return output.with_name(output.name + ".record.json") if output.suffix == ".nemo" else output / "record.json"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _identity(path: Path, excluding: Path) -> str:
    """What an input holds, as a hash: its record's, its nested records', or the sizes and times of its files."""
    record = read_record(path)
    if record is not None:
        return record["hash"]
    for parent in path.parents:  # a part of a recorded output (distill's model directory)
        if (found := read_record(parent)) is not None:
            return _digest([found["hash"], str(path.relative_to(parent))])
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


def parents(config: StageConfig) -> dict[str, dict[str, str]]:
    """Each input of a stage as ``{field: {"path", "hash"}}``; the hash changes when the input is made differently."""
    own = Path(config.output).absolute()
    found = config.inputs()
    return {name: {"path": path, "hash": _identity(Path(path).absolute(), own)} for name, path in found.items()}


def hashed_settings(config: StageConfig) -> dict[str, Any]:
    """The settings of a stage that its result depends on, paths of inputs left out."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_HASHED}
    settings["runtime"] = {k: v for k, v in settings["runtime"].items() if k not in _NOT_HASHED_RUNTIME}
    if "data" in settings:
        settings["data"] = {k: v for k, v in settings["data"].items() if k not in _NOT_HASHED}
    for path in config.INPUTS:
        *sections, name = path.split(".")
        section = settings
        for part in sections:
            section = section[part]
        value = section[name]
        section[name] = sorted(value) if isinstance(value, dict) else value is not None
    return settings


def config_hash(config: StageConfig) -> str:
    """Hash of everything a stage's result depends on: its settings and its parents' hashes.

    Independent of where inputs and output lie, so that a moved run directory stays valid.
    """
    return str(identity_of(config)["hash"])


def identity_of(config: StageConfig) -> dict[str, Any]:
    """What a stage's result depends on, as records keep it: ``stage, hash, settings, parents``."""
    settings, found = hashed_settings(config), parents(config)
    hashes = {name: parent["hash"] for name, parent in found.items()}
    return {
        "stage": config.STAGE,
        "hash": _digest([config.STAGE, settings, hashes]),
        "settings": settings,
        "parents": found,
    }


def read_record(output: str | Path) -> dict[str, Any] | None:
    """The record of an output, or None where there is none or it is not a whole one."""
    try:
        record = json.loads(record_path(output).read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return record if isinstance(record, dict) and record.get("version") == RECORD_VERSION else None


def write_record(
    output: str | Path,
    config: StageConfig,
    metrics: dict[str, Any],
    seconds: float,
    peak_rss_bytes: int | None = None,
    started: str | None = None,
) -> dict[str, Any]:
    """Write ``record.json`` beside an output, which declares the output whole.

    Args:
        output: what the stage wrote.
        config: the stage's resolved configuration.
        metrics: JSON values that its ``run`` returned.
        seconds: wall time.
        peak_rss_bytes: largest resident size of any of its processes.
        started: ISO time.

    Returns:
        The record: ``version, stage, name, hash, config, settings, parents, metrics, started, seconds, peak_rss_bytes,
        versions``.
    """
    record = {
        "version": RECORD_VERSION,
        **identity_of(config),
        "name": config.name or config.STAGE,
        "config": dataclasses.asdict(config),
        "metrics": metrics,
        "started": started,
        "seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes,
        "versions": _versions(),
    }
    path = record_path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(record, indent=2, default=str) + "\n")
    return record


def _versions() -> dict[str, str]:
    """Versions of what the result depends on, as installed."""
    import platform
    from importlib import metadata

    packages = ("nemo-minitron", "nemo-toolkit", "nemo-run", "megatron-core", "torch", "transformers", "lightning")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
