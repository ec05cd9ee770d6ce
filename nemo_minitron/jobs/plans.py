"""The plan of a stage, which ``--dry-run`` prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from nemo_minitron.config.hub import dataset_hint, download_hint

__all__ = ["PlannedPath", "StagePlan", "human_bytes", "human_count"]


@dataclass(frozen=True)
class PlannedPath:
    """A path that a stage reads or writes, and what it is ("teacher checkpoint")."""

    path: str
    what: str

    def exists(self) -> bool:
        """Whether it exists now."""
        return Path(self.path).exists()

    def comes_from(self, produced: set[str]) -> bool:
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
    """

    stage: str
    reads: list[PlannedPath] = field(default_factory=list)
    writes: list[PlannedPath] = field(default_factory=list)
    costs: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def missing_reads(self, produced: set[str]) -> list[str]:
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
