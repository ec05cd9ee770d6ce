"""Communication between the processes that lead the checks on each rank, without a process group.

Each rank of the stage leads child processes that run the checks, and survives if they crash. The leaders communicate
through a store of torch's, which torchrun, or rank 0, serves.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from datetime import timedelta
from typing import Any

from nemo_minitron.errors import MinitronError

__all__ = ["Ranks", "alone", "of_environment"]

POLL = 0.1


class Ranks:
    """This leader among all.

    Args:
        rank, world: its place.
        store: of torch; None for a world of one.

    Attributes:
        rank, world: as given.
    """

    def __init__(self, rank: int, world: int, store: Any = None) -> None:
        self.rank, self.world, self._store = rank, world, store
        self._here: dict[str, str] = {}

    @property
    def is_main(self) -> bool:
        """The first rank."""
        return self.rank == 0

    def publish(self, key: str, value: Any) -> None:
        """Write a JSON value that every rank can read."""
        text = json.dumps(value)
        if self._store is None:
            self._here[key] = text
        else:
            self._store.set(f"doctor/{key}", text)

    def read(self, key: str) -> Any:
        """The value that a rank has published under ``key``, or None."""
        if self._store is None:
            text = self._here.get(key)
            return None if text is None else json.loads(text)
        if not self._store.check([f"doctor/{key}"]):
            return None
        return json.loads(self._store.get(f"doctor/{key}"))

    def wait(self, key: str, seconds: float) -> Any:
        """The value of ``key``, as soon as a rank has published it.

        Raises:
            MinitronError: if none has within ``seconds``.
        """
        deadline = time.monotonic() + seconds
        while (value := self.read(key)) is None:
            if time.monotonic() > deadline:
                raise MinitronError(
                    f"rank {self.rank} of {self.world} waited {seconds:.0f} s for another rank ({key}) and gave up; "
                    "the logs of the other ranks tell what they were doing"
                )
            time.sleep(POLL)
        return value

    def gather(self, key: str, value: Any, seconds: float) -> list[Any]:
        """The values of all ranks, in order. Every rank calls it.

        Raises:
            MinitronError: if a rank has not published its value within ``seconds``.
        """
        self.publish(f"{key}/{self.rank}", value)
        return [self.wait(f"{key}/{rank}", seconds) for rank in range(self.world)]

    def leave(self, seconds: float) -> None:
        """End the communication. Every rank calls it last.

        Rank 0, which may serve the store, waits for the others, but not for one that has died.
        """
        if self._store is None:
            return
        if self.is_main:
            with contextlib.suppress(MinitronError):
                for rank in range(1, self.world):
                    self.wait(f"left/{rank}", seconds)
        else:
            self.publish(f"left/{self.rank}", True)


def alone() -> Ranks:
    """A world of one."""
    return Ranks(0, 1)


def of_environment(timeout_minutes: float) -> Ranks:
    """The ranks that torchrun, or Slurm, started."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return alone()
    from torch.distributed import rendezvous

    store, rank, world = next(rendezvous("env://", timeout=timedelta(minutes=timeout_minutes)))
    return Ranks(rank, world, store)
