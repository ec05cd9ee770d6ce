"""What a training leaves in its directory, told from the names alone."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Trained", "directories", "finished", "remove_unfinished"]

UNFINISHED = "-unfinished"
"""NeMo's marker beside a checkpoint that is being written or removed."""


@dataclass(frozen=True)
class Trained:
    """NeMo 2 directories of a plain model of its family.

    Attributes:
        last: weights, optimizer and position after the last step.
        best: weights of the best validation, where they are kept.
    """

    last: Path
    best: Path | None = None


def directories(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder."""
    folders = [path for path in folder.glob("step=*") if path.is_dir()]
    return sorted(path for path in folders if not path.with_name(path.name + UNFINISHED).exists())


def finished(directory: Path, steps: int) -> Trained | None:
    """What a training of so many steps left in ``directory``, or None if it has not come to its end.

    The checkpoint of the last step is saved after its validation, so nothing is lacking beside it.
    """
    last = directory / "checkpoints" / f"step={steps - 1}-last"  # NeMo counts from 0
    if last not in directories(last.parent):
        return None
    kept = directories(directory / "best")
    return Trained(last, min(kept, key=value_of) if kept else None)


def value_of(checkpoint: Path) -> float:
    """Of the validation that a best checkpoint is named after."""
    return float(checkpoint.name.rpartition("=")[2])


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed run left half-written (NeMo marks it), so that the resume finds only whole checkpoints.

    Every rank looks, and whichever comes first removes: nothing else touches the directory before training starts.
    """
    for marker in folder.glob("*" + UNFINISHED):
        shutil.rmtree(str(marker).removesuffix(UNFINISHED), ignore_errors=True)
        marker.unlink(missing_ok=True)
