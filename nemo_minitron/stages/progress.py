"""A progress bar on a terminal, and nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(what: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show how far ``what`` is.

    Args:
        what: description.
        total: units in all.
        shown: false on ranks that do not print.

    Yields:
        A function that is told how many units were done since its last call.
    """
    from rich.console import Console
    from rich.progress import Progress

    visible = shown and sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=not visible) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
