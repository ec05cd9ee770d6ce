"""Stop a job in good order: ranks that can finish their step and save it, and the launcher that tells them to.

Batch systems announce the end of a job: Slurm by SIGTERM, or earlier by the signal of ``--signal=USR1@seconds``. The
launcher of a job (:func:`~nemo_minitron.jobs.launch.launch`) sends SIGUSR1 to every rank that can stop in good order.
Such a rank has a file ``rank-<n>.stoppable`` in the job's folder. A job without such a rank is ended at once.
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

__all__ = ["STOP_SIGNALS", "Relay", "StopRequest"]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a job to save its state and end."""
FOLDER_VARIABLE = "MINITRON_JOB_FOLDER"
"""Environment variable with the folder of the job that a process belongs to."""
_PATTERN = "rank-*.stoppable"


class StopRequest:
    """A context in which the signals of :data:`STOP_SIGNALS` are recorded and have no other effect.

    Args:
        notify_launcher: write the file by which the launcher knows that this rank can stop in good order.

    Attributes:
        received: the first signal that arrived, or None.
    """

    def __init__(self, *, notify_launcher: bool = True) -> None:
        self.notify_launcher = notify_launcher
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python allows signal handlers in the main thread alone; elsewhere this context does nothing.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
            self._mark_stoppable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._before:
            self._unmark_stoppable()
            for number, handler in self._before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def reinstall(self) -> None:
        """Set the signal handlers again, after a library has replaced them by its own."""
        for number in self._before:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)

    def _stoppable_file(self) -> Path | None:
        folder = os.environ.get(FOLDER_VARIABLE)
        if folder is None or not self.notify_launcher:
            return None
        return Path(folder) / f"rank-{os.environ.get('RANK', '0')}.stoppable"

    def _mark_stoppable(self) -> None:
        if (path := self._stoppable_file()) is not None:
            replace_file(path, str(os.getpid()))

    def _unmark_stoppable(self) -> None:
        if (path := self._stoppable_file()) is not None:
            path.unlink(missing_ok=True)


class Relay:
    """A context in which the launcher of a job forwards :data:`STOP_SIGNALS` to its ranks, instead of ending by them.

    Args:
        folder: the job's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._request = StopRequest(notify_launcher=False)
        self._relayed = False

    def __enter__(self) -> Relay:
        self._request.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._request.__exit__(kind, error, where)

    def step(self) -> None:
        """Forward the signal that arrived, if any, to the ranks; once. The launcher calls it repeatedly.

        Raises:
            PreemptedError: if a signal arrived and no rank can stop in good order now.
        """
        received = self._request.received
        if received is None or self._relayed:
            return
        process_ids = sorted(int(path.read_text()) for path in self.folder.glob(_PATTERN))
        for process_id in process_ids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGUSR1)
        self._relayed = True
        if not process_ids:
            raise PreemptedError(
                f"{received.name} came; what was running does not save in the middle of its work and was ended. "
                "Give the same command again"
            )
