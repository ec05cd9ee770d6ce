"""Ranks that make no progress: which they are, and where each of them waits."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path

import psutil

__all__ = ["StallWatch"]

#: Seconds without progress of any rank until it is said, and seconds of processor time in them that count as progress.
QUIET, BUSY = 120.0, 2.0
_LOOK = 5.0
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)
_STACK = "most recent call first):"


class StallWatch:
    """Watches the ranks of a job on this host.

    A job has stalled when for :data:`QUIET` seconds none of its ranks has used the processor or written to its log:
    each waits for another, or for a disk. It is said once for each stall. A rank that waits for a GPU by asking it
    again and again uses the processor, so that only the time limit of its collectives ends it.

    Args:
        folder: of the job, with the ``rank-N.pid`` and ``rank-N.log`` of each rank.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._next, self._since, self._said, self._asked = 0.0, 0.0, False, False
        self._used: dict[int, float] = {}
        self._written = -1

    def step(self, now: float) -> str | None:
        """Look at the ranks, every few seconds.

        Args:
            now: monotonic time, in seconds.

        Returns:
            What each rank is doing, when the job has just been found to stall; else None.
        """
        if now < self._next:
            return None
        self._next = now + _LOOK
        used, written = self._progress()
        if self._asked:  # what they wrote because they were asked is no progress
            self._written, self._asked = written, False
            return None
        known = used and used.keys() == self._used.keys()
        busy = not known or any(used[rank] - before > BUSY for rank, before in self._used.items())
        if busy or written != self._written:
            self._used, self._written, self._since, self._said = used, written, now, False
            return None
        if self._said or now - self._since < QUIET:
            return None
        self._said = True
        return self._report(now - self._since)

    def _ranks(self) -> dict[int, psutil.Process]:
        ranks = {}
        for path in self.folder.glob("rank-*.pid"):
            with contextlib.suppress(psutil.Error, ValueError, OSError):
                process = psutil.Process(int(path.read_text()))
                if process.status() != psutil.STATUS_ZOMBIE:
                    ranks[int(path.stem.removeprefix("rank-"))] = process
        return dict(sorted(ranks.items()))

    def _progress(self) -> tuple[dict[int, float], int]:
        """Processor time of each rank with its children, in seconds, and bytes in all logs."""
        used = {}
        for rank, process in self._ranks().items():
            with contextlib.suppress(psutil.Error):
                times = [member.cpu_times() for member in (process, *process.children(recursive=True))]
                used[rank] = sum(time.user + time.system for time in times)
        return used, sum(path.stat().st_size for path in self.folder.glob("rank-*.log"))

    def _report(self, seconds: float) -> str:
        lines = [f"no rank has made progress for {seconds / 60:.0f} minutes (logs: {self.folder})"]
        for rank, process in self._ranks().items():
            with contextlib.suppress(psutil.Error):
                if process.status() == psutil.STATUS_STOPPED:
                    lines.append(f"  rank {rank} is stopped (process {process.pid}): continue it with kill -CONT")
                else:
                    lines.append(f"  rank {rank} (process {process.pid}) is in {self._place(rank, process.pid)}")
        self._asked = True
        return "\n".join(lines)

    def _place(self, rank: int, pid: int) -> str:
        """Where a rank is: the innermost frame of its main thread, which it writes to its log on SIGUSR2."""
        log = self.folder / f"rank-{rank}.log"
        before = log.stat().st_size if log.exists() else 0
        os.kill(pid, signal.SIGUSR2)
        deadline = time.monotonic() + 2.0
        text = ""
        while time.monotonic() < deadline and not _FRAME.search(text):
            time.sleep(0.05)
            with contextlib.suppress(OSError), log.open("rb") as file:
                file.seek(before)
                text = file.read().decode(errors="replace")
        # faulthandler writes the main thread last
        frames = _FRAME.findall(text.rpartition(_STACK)[2])
        if not frames:
            return f"a place that it does not say; its log is {log}"
        own = next((frame for frame in frames if "nemo_minitron" in frame[0]), frames[-1])
        inner = frames[0]
        where = f"{inner[2]} ({inner[0]}:{inner[1]})"
        return where if own == inner else f"{where}, called by {own[2]} ({own[0]}:{own[1]})"
