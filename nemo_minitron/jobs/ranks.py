"""The ranks of a job on this machine, forked from a warm parent instead of started by torchrun."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from nemo_minitron.jobs.launch import GRACE, Starter
from nemo_minitron.jobs.warm import current_pool
from nemo_minitron.jobs.warm_client import WarmProcess

__all__ = ["ForkedRanks", "forked"]

#: Seconds that the other ranks get to say why they fail too, once one has.
LINGER = 1.0


class ForkedRanks:
    """The processes of a job, one for each rank (:class:`~nemo_minitron.jobs.launch.Processes`).

    As under torchrun, once a rank has failed the others are terminated, and killed if they do not end.

    Args:
        ranks: the processes, by rank.
    """

    def __init__(self, ranks: Sequence[WarmProcess]) -> None:
        self.ranks = tuple(ranks)
        self.returncode: int | None = None
        self.first_failure: tuple[int, int] | None = None
        self._failed_at = 0.0
        self._asked = False

    @property
    def pids(self) -> list[int]:
        """Of the ranks that still run."""
        return [process.pid for process in self.ranks if process.returncode is None]

    def poll(self) -> int | None:
        """Check whether all have ended: 0, or the exit code of the rank that failed first."""
        codes = [process.poll() for process in self.ranks]
        if self.first_failure is None:
            failed = [(rank, code) for rank, code in enumerate(codes) if code]
            if failed:
                # Of those found at one look, one that was killed explains the others, which lost their connection.
                self.first_failure = min(failed, key=lambda item: item[1] > 0)
                self._failed_at = time.monotonic()
        if None not in codes:
            self.returncode = self.first_failure[1] if self.first_failure else 0
        elif self.first_failure is not None:
            since = time.monotonic() - self._failed_at
            if since > LINGER + GRACE:
                self._signal(signal.SIGKILL)
            elif since > LINGER and not self._asked:
                self._asked = True
                self._signal(signal.SIGTERM)
        return self.returncode

    def wait(self) -> int:
        """Wait for the end of all."""
        while (code := self.poll()) is None:
            time.sleep(0.02)
        return code

    def _signal(self, order: signal.Signals) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, order)


def forked(level: str) -> Starter:
    """A ``starter`` for :func:`~nemo_minitron.jobs.launch.launch` that forks ranks from the open pool, if there is one.

    Args:
        level: key of :data:`~nemo_minitron.jobs.warm.LEVELS`; the modules that are imported before the fork.
    """

    def start(
        module: str, args: Sequence[str], *, world_size: int, environment: dict[str, str], log: Path
    ) -> ForkedRanks | None:
        pool = current_pool()
        if pool is None:
            return None
        ranks: list[WarmProcess] = []
        address = _meeting_point(world_size) if world_size > 1 else {}
        for rank in range(world_size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "ROLE_RANK": str(rank)} if world_size > 1 else {}
            process = pool.start(
                level, module, args, environment=environment | address | own, cwd=Path.cwd(), output=log
            )
            if process is None:
                for started in ranks:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(started.pid, signal.SIGKILL)
                    started.wait()
                return None
            ranks.append(process)
        return ForkedRanks(ranks)

    return start


def _meeting_point(world_size: int) -> dict[str, str]:
    """The variables that torchrun sets for every rank of a job on one machine; rank 0 hosts the store."""
    return {
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "ROLE_NAME": "default",
        "ROLE_WORLD_SIZE": str(world_size),
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "none",
        "WORLD_SIZE": str(world_size),
    }


def _free_port() -> int:
    """A free port, below the range that the kernel uses for outgoing connections."""
    for port in random.SystemRandom().sample(range(12_000, 20_000), 1_000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise OSError("no free port between 12000 and 20000 on 127.0.0.1")
