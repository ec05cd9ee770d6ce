"""Writing aside: an output, a file or a directory, appears under its name whole or not at all."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_minitron.errors import DiskError, MinitronError

__all__ = ["clear_leftovers", "staging", "write_aside"]

#: What stands between an output's name and a process in the names beside it; "staged" and "partial-" are of earlier
#: releases.
_UNFINISHED, _REPLACED = ("partial.*", "files.*", "staged", "partial-*"), ("replaced.*",)


def staging(path: Path) -> Path:
    """Where an output may collect its parts: beside ``path``, cleared away by :func:`write_aside`."""
    return _beside(path, "files")


@contextmanager
def write_aside(
    path: Path,
    *,
    overwrite: bool,
    error: type[MinitronError] = MinitronError,
    alone: bool = False,
    parents: bool = True,
) -> Iterator[Path]:
    """A sibling path to write to (a directory or a file, the caller creates it), renamed to ``path`` at the end.

    Until the rename an existing ``path`` is untouched: an exception removes the sibling, a killed process leaves it
    behind under a name that starts with a dot, which the next write of the same output clears away. A file is replaced
    in one step. An existing directory is moved aside, not deleted, until the new one stands in its place; the next
    write puts it back if a kill came between.

    Args:
        path: of the output.
        overwrite: replace what stands there.
        error: what is raised.
        alone: nobody else writes this output now, see :func:`clear_leftovers`.
        parents: make the directory that it lies in, where it is missing.

    Raises:
        MinitronError: of the type ``error``, where ``path`` exists and ``overwrite`` is false, or the disk is full.
    """
    path = path.absolute()
    if parents:
        path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path, alone=alone)
    if path.exists() and not overwrite:
        raise error(f"{path} exists; choose another path or allow it to be overwritten")
    partial, replaced = _beside(path, "partial"), _beside(path, "replaced")
    try:
        yield partial
        _flush(partial)
        if path.exists() and (path.is_dir() or partial.is_dir()):
            path.rename(replaced)
        partial.replace(path)
    except BaseException as failure:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        if isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT):
            raise (DiskError if error is MinitronError else error)(
                f"no space left while writing {path}; what stood there before is untouched. "
                f"Free some space or choose a path on another disk"
            ) from failure
        raise
    finally:
        for left in (partial, staging(path), replaced):
            _remove(left)


def clear_leftovers(path: Path, *, alone: bool = False) -> None:
    """Remove what killed writes of an output left, and put it back if it was moved aside but not replaced.

    Args:
        path: of the output.
        alone: the caller knows that nobody else writes this output now, as under a lock: what any process on any host
            left is cleared, names of earlier releases too. Otherwise only what dead processes of this host left.
    """
    host = "" if alone else f"{socket.gethostname()}."
    for kind in (*_REPLACED, *_UNFINISHED):
        if not alone and not kind.endswith(".*"):
            continue
        pattern = kind.replace(".*", f".{host}*")
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.{pattern}"):
            pid = leftover.name.rsplit(".", 1)[1]
            if not alone and (not pid.isdigit() or _alive(int(pid))):
                continue
            if kind in _REPLACED and not path.exists():
                leftover.rename(path)
            else:
                _remove(leftover)


def _beside(path: Path, kind: str) -> Path:
    """The name beside ``path`` that belongs to this process."""
    return path.with_name(f".{path.name}.{kind}.{socket.gethostname()}.{os.getpid()}")


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
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
