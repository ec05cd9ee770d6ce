"""Output directories that are written aside and renamed when they are complete, and replaced under ``--overwrite``."""

from __future__ import annotations

import errno
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_minitron.errors import ConfigError, MinitronError

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
