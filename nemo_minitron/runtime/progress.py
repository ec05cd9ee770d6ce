"""Show the progress of a job: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

__all__ = ["Advance", "progress_bar"]

LINE_SECONDS = 10.0
"""Least time between two lines where there is no terminal."""

logger = logging.getLogger(__name__)


class Advance(Protocol):
    """A function to call with the number of units done since its last call, and an optional remark."""

    def __call__(self, count: int, status: str = "") -> None:
        """Advance by ``count``."""
        ...


@contextmanager
def progress_bar(what: str, total: int | None, *, completed: int = 0, shown: bool = True) -> Iterator[Advance]:
    """Show the progress of ``what`` within the block.

    The processes of a stage write to files; the launcher says through rich's ``TTY_COMPATIBLE`` whether those are shown
    on a terminal.

    Args:
        what: description.
        total: number of units; None if it is not known.
        completed: units that an earlier process did.
        shown: false on ranks that do not print.

    Yields:
        A function to call as work is done.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not shown:
        yield lambda count, status="": None
    elif not console.is_terminal:
        yield _Lines(what, total, completed)
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
        )
        with Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True
        ) as progress:
            task = progress.add_task(what, total=total, completed=completed, status="")
            yield lambda count, status="": progress.update(task, advance=count, status=status)


class _Lines:
    """A log line at most every :data:`LINE_SECONDS`."""

    def __init__(self, what: str, total: int | None, completed: int) -> None:
        self.what, self.total, self.done = what, total, completed
        self.last = time.monotonic()

    def __call__(self, count: int, status: str = "") -> None:
        self.done += count
        if (now := time.monotonic()) - self.last >= LINE_SECONDS:
            self.last = now
            of = "" if self.total is None else f" of {self.total}"
            logger.info("%s: %d%s%s", self.what, self.done, of, f", {status}" if status else "")
