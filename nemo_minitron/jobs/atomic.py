"""Output directories that are written aside and renamed when they are complete, and replaced under ``--overwrite``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_minitron.errors import ConfigError
from nemo_minitron.runtime.atomic import clear_leftovers, write_aside

__all__ = ["MARKER", "check_output", "stage_output"]


#: Left in every directory that :func:`stage_output` finishes. Like a record or ``minitron.json``, it shows that this
#: suite wrote the directory.
MARKER = ".minitron-output"


def check_output(path: str | Path, overwrite: bool) -> Path:
    """``path``, if a stage may write there.

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


def _replaceable(path: Path) -> bool:
    """Whether ``path`` is an output of this suite (or missing), so that ``overwrite`` may remove it."""
    if path.is_dir() and not path.is_symlink():
        marks = (MARKER, "record.json", "minitron.json")
        return not any(path.iterdir()) or any((path / mark).exists() for mark in marks)
    return path.is_file()


@contextmanager
def stage_output(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Write a stage's output directory aside and put it in place only when the block ends without an error.

    Call it on one rank only. Write below the yielded temporary sibling; see
    :func:`~nemo_minitron.runtime.atomic.write_aside` for what errors and kills leave.

    Args:
        path: final directory.
        overwrite: replace an earlier output of this suite.

    Yields:
        An empty directory beside ``path``.

    Raises:
        ConfigError: see :func:`check_output`; raised before anything is written.
        MinitronError: if the disk is full.
    """
    clear_leftovers(Path(path), alone=True)
    path = check_output(path, overwrite)
    with write_aside(path, overwrite=True, alone=True) as aside:
        aside.mkdir()
        yield aside
        (aside / MARKER).touch()
