"""Asked to stop: a rank that can finish its step and save says so, and its launcher passes signals on to it.

Batch systems announce the end of a job: Slurm by SIGTERM, or earlier by the signal of ``--signal=USR1@seconds``. The
launcher of a job (:func:`~nemo_minitron.jobs.launch.launch`) hands either on to every rank that has said, by a file
in the job's folder, that it can stop in good order; a job of which none can is ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from nemo_minitron.errors import PreemptedError
from nemo_minitron.runtime.files import replace_file

__all__ = ["ORDERS", "Relay", "StopRequest"]

ORDERS = (signal.SIGTERM, signal.SIGUSR1)
"""The signals that ask for an end in good order."""
FOLDER_VARIABLE = "MINITRON_JOB_FOLDER"
"""Of the environment: the folder of the job that a process belongs to."""
_PATTERN = "rank-*.stoppable"


class StopRequest:
    """A context in which the signals of :data:`ORDERS` are only noted.

    Args:
        announced: of a rank: its launcher shall hand signals on to it.

    Attributes:
        came: the first of them, or None.
    """

    def __init__(self, *, announced: bool = True) -> None:
        self.announced = announced
        self.came: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python allows signal handlers in the main thread alone; elsewhere nothing is noted, nothing is announced.
        if threading.current_thread() is threading.main_thread():
            self._before = {order: signal.signal(order, self._note) for order in ORDERS}
            self._announce(there=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._before:
            self._announce(there=False)
            for order, handler in self._before.items():
                signal.signal(order, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def insist(self) -> None:
        """Take the signals again, after a library has put a handler of its own before this one."""
        for order in self._before:
            signal.signal(order, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = self.came or signal.Signals(number)

    def _announce(self, *, there: bool) -> None:
        folder = os.environ.get(FOLDER_VARIABLE)
        if folder is None or not self.announced:
            return
        path = Path(folder) / f"rank-{os.environ.get('RANK', '0')}.stoppable"
        if there:
            replace_file(path, str(os.getpid()))
        else:
            path.unlink(missing_ok=True)


class Relay:
    """A context in which the launcher of a job hands :data:`ORDERS` on to its ranks, instead of dying of them.

    Args:
        folder: the job's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._request = StopRequest(announced=False)
        self._told = False

    def __enter__(self) -> Relay:
        self._request.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._request.__exit__(kind, error, where)

    def step(self) -> None:
        """Hand a signal on, once.

        Raises:
            PreemptedError: if no rank can stop in good order now.
        """
        order = self._request.came
        if order is None or self._told:
            return
        ranks = sorted(int(path.read_text()) for path in self.folder.glob(_PATTERN))
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGUSR1)
        self._told = True
        if not ranks:
            raise PreemptedError(
                f"{order.name} came; what was running does not save in the middle of its work and was ended. "
                "Give the same command again"
            )
