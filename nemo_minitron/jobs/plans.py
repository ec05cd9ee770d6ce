"""The plan of a stage, which ``--dry-run`` prints."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from nemo_minitron.config.hub import dataset_hint, download_hint
from nemo_minitron.jobs.expected import ExpectedModel

__all__ = ["DiskNeed", "PlannedPath", "StagePlan", "human_bytes", "human_count"]


@dataclass(frozen=True)
class PlannedPath:
    """A path that a stage reads or writes, and what it is ("teacher checkpoint")."""

    path: str
    what: str

    def exists(self) -> bool:
        """Whether it exists now."""
        return Path(self.path).exists()

    def comes_from(self, produced: Collection[str]) -> bool:
        """Whether it is, is below, or contains one of the paths that earlier stages write."""
        own = Path(self.path).absolute()
        made = [Path(path).absolute() for path in produced]
        return any(own.is_relative_to(path) or path.is_relative_to(own) for path in made)

    def size(self) -> int | None:
        """Bytes on disk, or None where it does not exist."""
        path = Path(self.path)
        if path.is_dir():
            return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return path.stat().st_size if path.exists() else None


@dataclass(frozen=True)
class DiskNeed:
    """Bytes that a stage writes.

    Attributes:
        what: they are ("training states").
        path: that they are written to, or beside.
        bytes: expected at most at one time.
        stay: how many of them stay when the stage has ended; None for all.
        least: what they are in any case, for the check before the stage starts; None for ``bytes``.
    """

    what: str
    path: str
    bytes: float
    stay: float | None = None
    least: float | None = None

    @property
    def staying(self) -> float:
        """Bytes that are left when the stage has ended."""
        return self.bytes if self.stay is None else self.stay

    @property
    def certain(self) -> float:
        """Bytes that are written in any case."""
        return self.bytes if self.least is None else self.least


@dataclass
class StagePlan:
    """What a stage would read, write and cost.

    Attributes:
        stage: its name.
        reads: inputs; one that neither exists nor is written by an earlier stage of a pipeline is reported as a fault.
        writes: outputs.
        costs: rows of the table, name -> formatted value ("parameters" -> "134.5 M", "tokens", "FLOPs", "memory", ...).
        notes: one-line remarks.
        faults: reasons why the stage would fail, one line each.
        makes: the models that it writes, by path; None for sizes that are known only when the stage has run.
        disk: what it writes; empty where that is not known. Files of a few kilobytes are left out.
        flops: operations of its models; None where that is not known, or there are none.
    """

    stage: str
    reads: list[PlannedPath] = field(default_factory=list)
    writes: list[PlannedPath] = field(default_factory=list)
    costs: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    makes: dict[str, ExpectedModel | None] = field(default_factory=dict)
    disk: list[DiskNeed] = field(default_factory=list)
    flops: float | None = None

    def missing_reads(self, produced: Collection[str]) -> list[str]:
        """Faults for inputs that do not exist and are not among the ``produced`` paths of earlier stages."""
        return [
            f"{item.what}: {item.path} does not exist"
            f"{dataset_hint(item.path) if item.what.startswith('text') else download_hint(item.path)}"
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
