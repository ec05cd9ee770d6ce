"""The outputs of a training in its directory, read from file names alone."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Trained", "directories", "finished", "remove_unfinished", "step_of"]

UNFINISHED = "-unfinished"
"""NeMo's marker beside a checkpoint that is being written or removed."""


@dataclass(frozen=True)
class Trained:
    """NeMo 2 directories of a plain model of its family.

    Attributes:
        last: weights, optimizer and position after the last step.
        best: weights of the best validation, if they were kept; else None.
    """

    last: Path
    best: Path | None = None


def directories(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder."""
    folders = [path for path in folder.glob("step=*") if path.is_dir()]
    return sorted(path for path in folders if not path.with_name(path.name + UNFINISHED).exists())


def finished(directory: Path, steps: int) -> Trained | None:
    """Outputs of a training of ``steps`` steps in ``directory``, or None if it is not finished.

    The checkpoint of the last step is saved after its validation, so everything else is complete by then.
    """
    last = directory / "checkpoints" / f"step={steps - 1}-last"  # NeMo counts from 0
    if last not in directories(last.parent):
        return None
    kept = directories(directory / "best")
    return Trained(last, min(kept, key=value_of) if kept else None)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a training checkpoint."""
    match = re.match(r"step=(\d+)", checkpoint.name)
    return int(match[1]) if match else -1


def value_of(checkpoint: Path) -> float:
    """The validation value in the name of a best checkpoint."""
    return float(checkpoint.name.rpartition("=")[2])


def remove_unfinished(folder: Path) -> None:
    """Remove unfinished checkpoints of a killed run (NeMo marks them), so that the resume finds only whole ones.

    Every rank tries; the first one removes, and nothing else touches the directory before training starts.
    """
    for marker in folder.glob("*" + UNFINISHED):
        shutil.rmtree(str(marker).removesuffix(UNFINISHED), ignore_errors=True)
        marker.unlink(missing_ok=True)
