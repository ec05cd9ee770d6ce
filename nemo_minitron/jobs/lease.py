"""Leases: a file beside an output says which process writes it, so that no second one does.

A lock of the system is not enough: it ends at the borders of a host on many shared file systems. A lease is a file that
appears in one step (a hard link, as NFS has it too) and whose time of change its holder renews. It is free again when
the holder releases it or is dead: a process of this host that is gone, or a process of another host that has not
renewed its lease for :data:`EXPIRES` seconds. All times are those of the file system, so the clocks of the hosts need
not agree.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from nemo_minitron.errors import ConfigError, MinitronError
from nemo_minitron.jobs.launch import is_alive
from nemo_minitron.parsing import parse_json

__all__ = ["Holder", "Lease", "check_held", "holder_of", "leased", "release_all"]

logger = logging.getLogger(__name__)

#: Seconds between renewals, and without one after which the holder on another host counts as dead.
RENEW, EXPIRES = 10.0, 60.0
_POLL = 0.5
#: Seconds that the processes of a dead launcher may take to notice it (:func:`~nemo_minitron.jobs.launch.attach`).
_ORPHANS = 1.5


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    Attributes:
        what: what it runs, such as "minitron distill".
        host: its host name, for messages.
        place: host, boot and PID namespace: where ``pid`` means this process.
        pid, born: process id and time of its start (``psutil``), which tells it from a later process of the same id.
        since: local time at its start, for messages.
        job, restart: of Slurm; a job that was queued again has a greater ``restart``.
        token: of this lease alone.
    """

    what: str
    host: str
    place: str
    pid: int
    born: float
    since: str
    job: str | None
    restart: int
    token: str

    @classmethod
    def of_this_process(cls, what: str) -> Holder:
        """This process as the holder of a new lease."""
        return cls(
            what,
            host=socket.gethostname(),
            place=_place(),
            pid=os.getpid(),
            born=psutil.Process().create_time(),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            job=os.environ.get("SLURM_JOB_ID"),
            restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            token=uuid.uuid4().hex,
        )

    def __str__(self) -> str:
        return f"`{self.what}`, process {self.pid} on {self.host} since {self.since}"


class Lease:
    """The lease of one output.

    Args:
        path: its file.
        subject: what is leased, for messages.
        what: what this process runs.
    """

    def __init__(self, path: Path, subject: str, what: str) -> None:
        self.path, self.subject = path, subject
        self.me = Holder.of_this_process(what)
        self._stop, self._lost = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Take the lease; that of a dead holder is taken over.

        A holder on another host that has not renewed its lease lately is watched until it does or counts as dead.

        Raises:
            ConfigError: if a living process holds it, or its file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            seen: tuple[str, float] | None = None  # the token and time of change of a holder that is watched
            while not self._create():
                with _guarded(self.path.parent):
                    held = _read(self.path)
                    if held is None:  # released in between
                        continue
                    holder, changed = held
                    taken_over = self._is_dead(holder, changed) and self._remove(holder)
                if taken_over:
                    if _now(self.path) - changed < RENEW + _ORPHANS:
                        time.sleep(_ORPHANS)
                    continue
                key = (holder.token if holder else "", changed)
                if holder is not None and (holder.place == self.me.place or (seen and seen != key)):
                    raise ConfigError(f"{self.subject}: {holder}, is writing it; wait for it or stop it")
                if seen is None:
                    logger.warning("%s: waiting to see whether %s still runs", self.subject, holder or "a process")
                seen = key
                time.sleep(_POLL)
        except OSError as error:
            raise ConfigError(
                f"{self.subject}: cannot be written ({error.strerror}: {error.filename}); choose another output"
            ) from error
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the lease back."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._is_mine():
            self.path.unlink(missing_ok=True)

    def check(self) -> None:
        """Refuse to go on without the lease: before an output is marked as complete.

        Raises:
            MinitronError: if another process took it over, as this process was stopped or cut off for too long.
        """
        if self._lost.is_set() or not (self._is_mine() or (not self.path.exists() and self._create())):
            held = _read(self.path)
            raise MinitronError(
                f"{self.subject}: this process did not renew its lease for {EXPIRES:g} seconds and "
                f"{held[0] if held and held[0] else 'another process'}, took it over; its output is left to that one"
            )

    def _create(self) -> bool:
        """Make the file with its content in one step; False if there is one."""
        aside = self.path.with_name(f"{self.path.name}.{self.me.token}")
        content = json.dumps(dataclasses.asdict(self.me)).encode()
        try:
            aside.write_bytes(content)
            try:
                os.link(aside, self.path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
                    raise
                try:  # a file system without hard links
                    with open(self.path, "xb") as file:
                        file.write(content)
                except FileExistsError:
                    return False
            return True
        finally:
            aside.unlink(missing_ok=True)

    def _is_dead(self, holder: Holder | None, changed: float) -> bool:
        """Whether a holder is gone; None is a file that says nothing, left by a crash while it was written."""
        if holder is not None:
            if holder.place == self.me.place:
                return not is_alive(holder.pid, holder.born)
            if holder.job is not None and holder.job == self.me.job and holder.restart < self.me.restart:
                return True  # Slurm has ended the earlier attempt before it started this one
        return _now(self.path) - changed > EXPIRES

    def _remove(self, dead: Holder | None) -> bool:
        """Take a dead holder's file away. Of several processes that see it, the rename succeeds in one (True)."""
        aside = self.path.with_name(f"{self.path.name}.{self.me.token}.dead")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return False
        moved = _read(aside)
        is_dead = moved is None or moved[0] == dead
        if not is_dead:  # a living process was faster, and this is its lease
            with contextlib.suppress(FileExistsError):
                os.link(aside, self.path)
        aside.unlink(missing_ok=True)
        return is_dead

    def _is_mine(self) -> bool:
        held = _read(self.path)
        return held is not None and held[0] is not None and held[0].token == self.me.token

    def _renew(self) -> None:
        while not self._stop.wait(RENEW):
            try:
                if self._is_mine() or (not self.path.exists() and self._create()):  # created again if it was deleted
                    os.utime(self.path)
                else:
                    self._lost.set()
                    logger.error("%s: another process has taken the lease over", self.subject)
                    return
            except OSError as error:  # a file system that does not answer may answer again
                logger.warning("%s: the lease cannot be renewed (%s)", self.subject, error)


_held: dict[Path, Lease] = {}


@contextlib.contextmanager
def leased(path: Path, subject: str, what: str) -> Iterator[Lease]:
    """Hold a lease while the block runs. A process that holds it already goes on under the same.

    Args:
        path: file of the lease.
        subject: what is leased, for messages.
        what: what this process runs, for the messages of others.

    Raises:
        ConfigError: if another process holds it.
    """
    path = path.absolute()
    if (held := _held.get(path)) is not None and held.me.pid == os.getpid():
        yield held
        return
    lease = Lease(path, subject, what)
    lease.take()
    _held[path] = lease
    try:
        yield lease
    finally:
        del _held[path]
        lease.release()


def check_held(path: Path) -> None:
    """:meth:`Lease.check` of the lease that this process holds at ``path``, if it holds one."""
    if (held := _held.get(path.absolute())) is not None and held.me.pid == os.getpid():
        held.check()


def holder_of(path: Path) -> tuple[Holder, bool] | None:
    """Who holds the lease at ``path``, and whether it still runs; None where nobody does. Nothing is written.

    Of a holder on another host only its last renewal is seen, by the clock of this host.
    """
    try:
        held = _read(path)
    except OSError:
        return None
    holder, changed = held if held is not None else (None, 0.0)
    if holder is None:
        return None
    if holder.place == _place():
        return holder, is_alive(holder.pid, holder.born)
    return holder, time.time() - changed <= EXPIRES


def release_all() -> None:
    """Release what this process holds, before it ends without leaving its blocks (``os._exit``)."""
    for lease in _held.values():
        if lease.me.pid == os.getpid():
            lease.release()


def _read(path: Path) -> tuple[Holder | None, float] | None:
    """The holder in a lease's file (None: it does not say) and the file's time of change; None where there is no file.

    Opening a file makes a client of NFS ask the server anew, which ``stat`` does not.
    """
    try:
        with path.open("rb") as file:
            changed = os.fstat(file.fileno()).st_mtime
            content: Any = parse_json(file.read())
        return Holder(**content), changed
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return None, changed


@contextlib.contextmanager
def _guarded(directory: Path) -> Iterator[None]:
    """Let the processes of this host look at dead holders in ``directory`` one after the other.

    Without it one of them could take away what another has just made. Across hosts :meth:`Lease._remove` puts it back.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not on every file system
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _now(path: Path) -> float:
    """The time by the clock of the file system that ``path`` is on."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.now")
    try:
        aside.touch()
        return aside.stat().st_mtime
    finally:
        aside.unlink(missing_ok=True)


@cache
def _place() -> str:
    """Where a process id means the same process: host, boot and PID namespace."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)
