"""Outputs written aside and put in place when they are whole; what ``--overwrite`` may replace."""

from __future__ import annotations

import errno
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_minitron.config import StageConfig
from nemo_minitron.errors import ConfigError, MinitronError, PreemptedError

__all__ = ["MARKER", "check_output", "own_output", "set_aside", "stage_output"]


#: Left in every directory that :func:`stage_output` finishes: like a record or ``minitron.json``, it says: ours.
MARKER = ".minitron-output"


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


def _replaceable(path: Path) -> bool:
    """Whether ``path`` is an output of ours (or nothing), so that ``overwrite`` may remove it."""
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
