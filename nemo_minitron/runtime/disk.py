"""Faults of a disk, recognised under the errors that libraries make of them."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.errors import DiskError

__all__ = ["Room", "disk_fault", "full_disk", "room"]

#: Bytes below which a file system counts as full when a process has ended without a word.
_ROOM = 1 << 20
#: What torch says when a write was cut short; the system's error is lost on the way.
_CUT_SHORT = ("unexpected pos", "iostream error", "PytorchStreamWriter failed")
_REMEDIES = {
    errno.ENOSPC: "free some space, or choose an output on another disk",
    errno.EDQUOT: "the quota is used up: remove something, or choose an output on another disk",
    errno.EROFS: "choose an output on a disk that can be written",
    errno.EACCES: "change its permissions, or choose another output",
    errno.EPERM: "change its permissions, or choose another output",
    errno.ENAMETOOLONG: "choose a shorter name for the output",
    errno.EFBIG: "the limit on the size of files (ulimit -f) is too low, or the disk does not take files of this size",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}


@dataclass(frozen=True)
class Room:
    """The space of a file system.

    Attributes:
        device: tells file systems apart.
        free: bytes that this user may still write; a quota may allow fewer.
        mount: where it is mounted.
    """

    device: int
    free: int
    mount: Path


def room(path: Path) -> Room | None:
    """The space of the file system that ``path`` is on, or will be; None where the system does not say.

    A file system that states no size at all (as some in user space do) says nothing of what is free.
    """
    try:
        place = _existing(path)
        stated = os.statvfs(place)
        if stated.f_blocks == 0:
            return None
        return Room(place.stat().st_dev, stated.f_bavail * (stated.f_frsize or stated.f_bsize), _mount(place))
    except OSError:
        return None


def disk_fault(error: BaseException, folder: Path) -> DiskError | None:
    """The fault of the disk behind an error, anywhere among its causes; None if there is none.

    Args:
        error: as a stage ended with it.
        folder: on the file system that the stage writes to, for errors that name no file.
    """
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in _REMEDIES:
            place = Path(os.fsdecode(cause.filename)) if isinstance(cause.filename, str | bytes) else folder
            reason = os.strerror(cause.errno)
            state = f" ({_state(place)})" if cause.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            return DiskError(f"{place}: {reason}{state}; {_REMEDIES[cause.errno]}")
    for cause in _chain(error):
        # safetensors' own class, and torch's RuntimeError
        if any(text in str(cause) for text in (*_CUT_SHORT, os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))):
            return DiskError(
                f"{folder}: a write was cut short, as on a full disk or a used-up quota ({_state(folder)}); "
                f"{_REMEDIES[errno.ENOSPC]}"
            )
    return None


def full_disk(folder: Path) -> DiskError | None:
    """The fault if the file system of ``folder`` is full: the likely reason why a process left no result."""
    if shutil.disk_usage(_existing(folder)).free >= _ROOM:
        return None
    return DiskError(f"{folder}: the disk is full ({_state(folder)}); {_REMEDIES[errno.ENOSPC]}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        cause = waiting.pop(0)
        if cause is None or id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        waiting += [cause.__cause__, cause.__context__]
        if isinstance(cause, BaseExceptionGroup):
            waiting += cause.exceptions


def _state(path: Path) -> str:
    """Free and total bytes of the file system of a path, and where it is mounted."""
    place = _existing(path)
    usage = shutil.disk_usage(place)
    return f"{usage.free / 2**20:,.0f} of {usage.total / 2**20:,.0f} MiB are free on {_mount(place)}"


def _mount(place: Path) -> Path:
    mount = place.resolve()
    while not mount.is_mount():
        mount = mount.parent
    return mount


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
