"""``failed.json`` beside the logs of a stage: why its last run ended without a result, as the launcher saw it.

Ranks leave results of their own (:mod:`nemo_minitron.jobs.results`); a stage that is refused before they start has
none, nor has one whose ranks were killed.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs.results import read_results
from nemo_minitron.parsing import parse_json
from nemo_minitron.runtime.files import replace_file

__all__ = ["Failure", "forget_failure", "last_failure", "noting_failure"]

_FILE = "failed.json"


@dataclass(frozen=True)
class Failure:
    """How the last run of a stage failed.

    Attributes:
        error: class name of the exception.
        message: the line that says why.
        exit_code: of the command.
        time: seconds since the epoch.
    """

    error: str
    message: str
    exit_code: int
    time: float


@contextlib.contextmanager
def noting_failure(folder: Path) -> Iterator[None]:
    """Write down an error that leaves the block; what was written before goes when the block begins.

    Args:
        folder: of the stage's logs.
    """
    forget_failure(folder)
    try:
        yield
    except BaseException as error:
        code = (
            error.exit_code if isinstance(error, MinitronError) else 130 if isinstance(error, KeyboardInterrupt) else 1
        )
        text = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        failure = Failure(type(error).__name__, _line(text), code, time.time())
        with contextlib.suppress(OSError, MinitronError):  # on a full disk it stays unsaid
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(folder / _FILE, json.dumps(asdict(failure)) + "\n")
        raise


def forget_failure(folder: Path) -> None:
    """Remove what was written of the run before."""
    (folder / _FILE).unlink(missing_ok=True)


def last_failure(folder: Path) -> Failure | None:
    """How the last run failed, by the launcher's note or else by the first rank that did; None if it did not.

    Damaged files say nothing.
    """
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Failure(**parse_json((folder / _FILE).read_bytes()))
    try:
        results = read_results(folder)
    except (OSError, ValueError, TypeError):
        return None
    failed = sorted((r for r in results if r.status != "done"), key=lambda r: (r.status != "refused", r.time))
    if not failed:
        return None
    first = failed[0]
    code = 1 if first.status == "crashed" else 75 if first.error == "PreemptedError" else 2
    return Failure(first.error, _line(first.message), code, first.time)


def _line(message: str) -> str:
    """The first line of a message; of a traceback, the line with the error."""
    lines = [line.rstrip() for line in message.strip().splitlines()]
    if lines and lines[0].startswith("Traceback"):
        errors = [line for line in lines[1:] if line and not line.startswith((" ", "Rank "))]
        return errors[-1] if errors else lines[0]
    for number, line in enumerate(lines):  # the log's last lines may come before what is said of them
        if line.startswith("Rank ") and "ended without a result" in line:
            return line
        if line.startswith("Traceback"):
            return _line("\n".join(lines[number:]))
    return lines[0] if lines else ""
