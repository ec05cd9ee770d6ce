"""Reads on a thread, a few before their results are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

__all__ = ["Pending", "ReadAhead"]

T = TypeVar("T")


class Pending(Generic[T]):
    """A read that may not have happened yet."""

    def __init__(self, read: Callable[[], T], submit: Callable[[Callable[[], T]], Future[T]]) -> None:
        self._read, self._submit = read, submit
        self._future: Future[T] | None = None
        self.following: Pending[T] | None = None

    def start(self) -> Future[T]:
        """Queue the read, unless it is queued."""
        if self._future is None:
            self._future = self._submit(self._read)
        return self._future

    def result(self) -> T:
        """What was read; waits for it, and queues the read that is ``ahead`` places further.

        It is not kept here: asked for again, it is read again.

        Raises:
            Exception: what the read raised.
        """
        future, following = self.start(), self.following
        self._future = self.following = None
        if following is not None:
            following.start()
        return future.result()


class ReadAhead(Generic[T]):
    """Does reads one after another, in order, on one thread.

    The thread starts with the first read, so an object may be made before a process forks. At most ``ahead`` reads are
    under way or done and not asked for: that bounds what is in memory, and what the end of a process waits for.

    Args:
        ahead: that number, at least 1.
    """

    def __init__(self, ahead: int = 4) -> None:
        self._ahead = ahead
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False

    def begin(self, reads: Sequence[Callable[[], T]]) -> list[Pending[T]]:
        """Start with the first of some reads; the others follow as results are asked for.

        Args:
            reads: in the order in which their results will be asked for; another order costs time alone.
        """
        pending = [Pending(read, self._submit) for read in reads]
        for position, entry in enumerate(pending):
            if position < self._ahead:
                entry.start()
            else:
                pending[position - self._ahead].following = entry
        return pending

    def close(self) -> None:
        """Drop the reads that did not start, wait for the one at work and end the thread."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _submit(self, read: Callable[[], T]) -> Future[T]:
        if self._closed:
            raise RuntimeError("the reads were closed")
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        return self._pool.submit(read)
