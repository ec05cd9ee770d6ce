"""What became of each rank of a job, by the file that it leaves in the job's folder, and of the job.

Exit codes carry no message, and torchrun and nemo_run each wrap their own around it; so the files decide.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_minitron import errors
from nemo_minitron.errors import MinitronError
from nemo_minitron.runtime.disk import disk_fault, full_disk
from nemo_minitron.runtime.files import replace_file
from nemo_minitron.runtime.requirements import missing

__all__ = [
    "ATTEMPT_VARIABLE",
    "RankResult",
    "StageCrashError",
    "begin_attempt",
    "failure",
    "read_results",
    "save_result",
    "verdict",
]

ATTEMPT_VARIABLE = "MINITRON_ATTEMPT"
"""Of the environment: which of the attempts of a cluster's job a rank belongs to."""
_ATTEMPT = "attempt"


class StageCrashError(Exception):
    """A process of a job failed by no fault of the user's; the message holds its traceback and its log's path."""


@dataclass
class RankResult:
    """The result of a rank.

    Attributes:
        rank: global rank.
        status: "done", "refused" (a :class:`MinitronError`) or "crashed".
        seconds: from :func:`attach` to the end.
        peak_rss_bytes: its largest resident size.
        peak_gpu_bytes: the most that its tensors took of its GPU; 0 if it used none.
        error: class name of the exception.
        message: of the exception; of a crash the traceback.
        metrics: what the job returned (JSON values).
        time: when it ended, seconds since the epoch.
    """

    rank: int
    status: str
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    peak_gpu_bytes: int = 0
    error: str = ""
    message: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    time: float = field(default_factory=time.time)


def begin_attempt(folder: Path, attempt: str) -> None:
    """Called by rank 0 of a job that a cluster may start again: results of earlier attempts are ignored from now on.

    A node that hung and was given up may run again later, and write a result of the earlier attempt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / _ATTEMPT, attempt)


def save_result(folder: Path, result: RankResult) -> None:
    """Write a rank's result, atomically; nothing if a new attempt of the job has begun without this rank."""
    own, path = os.environ.get(ATTEMPT_VARIABLE), folder / _ATTEMPT
    if own is not None and path.exists() and path.read_text() != own:
        return
    replace_file(folder / f"rank-{result.rank}.json", json.dumps(asdict(result), default=str))


def failure(rank: int, error: BaseException, folder: Path | None = None) -> RankResult:
    """The result of a rank that ended with ``error``.

    Args:
        rank: global rank.
        error: what the stage raised.
        folder: on the disk that the stage writes to; a fault of that disk is named instead of what a library made of
            it.
    """
    error = missing(error, for_="this stage") or error
    if folder is not None and not isinstance(error, MinitronError):
        error = disk_fault(error, folder) or error
    if isinstance(error, MinitronError):
        return RankResult(rank, "refused", error=type(error).__name__, message=str(error))
    text = "".join(traceback.format_exception(error)).rstrip()
    return RankResult(rank, "crashed", error=type(error).__name__, message=text)


def read_results(folder: Path) -> list[RankResult]:
    """The results in the folder, by rank."""
    results = [RankResult(**json.loads(path.read_text())) for path in folder.glob("rank-*.json")]
    return sorted(results, key=lambda result: result.rank)


def verdict(folder: Path, world_size: int, code: int, first_failure: tuple[int, int] | None = None) -> list[RankResult]:
    """The results if all ranks are done, else the one failure that explains the others.

    Args:
        folder: the job's.
        world_size: number of ranks.
        code: exit code of the launcher, for a rank that left no result.
        first_failure: ``(rank, exit code)`` of the rank that failed first; None asks torchrun's log.

    Raises:
        MinitronError: that a rank refused its work with.
        StageCrashError: where a rank failed otherwise, or left no result.
    """
    results = read_results(folder)
    failed = sorted((r for r in results if r.status != "done"), key=lambda r: (r.status != "refused", r.time))
    if failed and failed[0].status == "refused":
        kind = getattr(errors, failed[0].error, MinitronError)
        raise (kind if issubclass(kind, MinitronError) else MinitronError)(failed[0].message)
    if len(results) == world_size and not failed:
        return results
    # A rank that was killed leaves no result; its peers then crash on the lost connection, which explains nothing.
    silent = sorted(set(range(world_size)) - {result.rank for result in results})
    if silent and (fault := full_disk(folder)) is not None:  # then a rank cannot say so
        raise fault
    first = first_failure or _first_failure(folder)
    if failed and not (first is not None and first[0] in silent):
        crash = failed[0]
        raise StageCrashError(
            f"{crash.message}\nRank {crash.rank} of {world_size} crashed. Log: {folder}/rank-{crash.rank}.log"
        )
    rank, code = first if first is not None and first[0] in silent else (silent[0], code)
    log = folder / f"rank-{rank}.log"
    if code == MinitronError.exit_code:  # as where a quota is used up: the disk has room, but not for this user
        said = _last_refusal(log) or _last_refusal(folder / "launcher.log")
        said = said or f"{folder}: takes no more files or bytes; look at the quota and at ulimit -f"
        raise MinitronError(f"{said} (rank {rank} of {world_size} could not write its result. Log: {log})")
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    hint = "; a process that needs more memory than the machine has ends so" if code == -signal.SIGKILL else ""
    raise StageCrashError(
        f"{_last_lines(log, folder / 'launcher.log')}"
        f"Rank {rank} of {world_size} ended without a result ({how}{hint}). Log: {log}"
    )


def _first_failure(folder: Path) -> tuple[int, int] | None:
    """``(rank, exit code)`` that torchrun's summary names as the root cause, if there is one."""
    pattern = re.compile(r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", re.DOTALL)
    for path in (folder / "nemo_run").rglob("stderr.log"):
        if match := pattern.search(path.read_text(errors="replace")):
            return int(match[1]), int(match[2])
    return None


def _last_refusal(log: Path) -> str | None:
    """What a rank logged last as the reason of its end; None if it is not in a whole line, or not there."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    match = re.search(r" ERROR nemo_minitron: (.+)$", lines[-1]) if lines else None
    return match[1] if match else None


def _last_lines(*paths: Path, count: int = 15) -> str:
    """The last lines of the first of ``paths`` that is not empty."""
    for path in paths:
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        if lines:
            return "\n".join(lines[-count:]) + "\n"
    return ""
