"""Write outputs aside and rename them, so that an output appears under its name complete or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_minitron.errors import CheckpointError

__all__ = ["staging", "write_aside"]


def staging(path: Path) -> Path:
    """A directory beside ``path`` for the parts of an output that is one file; :func:`write_aside` removes it."""
    return path.with_name(f".{path.name}.files.{socket.gethostname()}.{os.getpid()}")


@contextmanager
def write_aside(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A sibling path to write to (a directory or a file, the caller creates it), renamed to ``path`` at the end.

    Until the rename an existing ``path`` is untouched: an exception removes the sibling, a killed process leaves it
    behind under a name that starts with a dot (the next write of the same output on this host clears it away). An
    existing ``path`` is moved aside, not deleted, until the new one stands in its place.

    Raises:
        CheckpointError: where ``path`` exists and ``overwrite`` is false, or the disk is full.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(path)
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists; choose another path or allow it to be overwritten")
    mark = f"{socket.gethostname()}.{os.getpid()}"
    files = staging(path)
    partial, replaced = path.with_name(f".{path.name}.partial.{mark}"), path.with_name(f".{path.name}.replaced.{mark}")
    try:
        yield partial
        _flush(partial)
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
    except OSError as error:
        _remove(partial)
        _remove(files)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"no space left while writing {path}; what stood there before is untouched. "
                f"Free some space or choose a path on another disk"
            ) from error
        raise
    except BaseException:
        _remove(partial)
        _remove(files)
        raise
    _remove(files)
    _remove(replaced)


def _clear_leftovers(path: Path) -> None:
    """Remove leftovers of dead processes of this host; restore an output that was moved aside but not replaced."""
    host = socket.gethostname()
    for kind in ("partial", "files", "replaced"):
        for leftover in path.parent.glob(f".{_escape(path.name)}.{kind}.{host}.*"):
            pid = leftover.name.rsplit(".", 1)[1]
            if not pid.isdigit() or _alive(int(pid)):
                continue
            if kind == "replaced" and not path.exists():
                leftover.rename(path)
            else:
                _remove(leftover)


def _escape(name: str) -> str:
    import glob

    return glob.escape(name)


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # an earlier write of this very process: it is over
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flush(path: Path) -> None:
    """Force everything below ``path`` to disk, so that the rename cannot overtake the data."""
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
