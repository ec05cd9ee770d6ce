"""The error tree. Every error that a user can cause is a :class:`MinitronError`.

A message names the bad value, where it came from and the remedy. The command line prints the message alone
(no traceback) and exits with 2, after a signal that asked for an end with 75; anything outside the tree is a fault of
ours, shown with its traceback, exit code 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DiskError",
    "FailedChecksError",
    "MinitronError",
    "MissingDependency",
    "NonFiniteError",
    "PreemptedError",
    "ShapeError",
    "faults_message",
    "first_line",
]


class MinitronError(Exception):
    """Root of the tree: something the user can put right."""

    #: Of a process that ends by it.
    exit_code: ClassVar[int] = 2


class DiskError(MinitronError):
    """The disk is full, cannot be written, or refuses a name."""


class ConfigError(MinitronError):
    """A configuration that cannot be run. Carries every fault found, not only the first."""

    def __init__(self, faults: str | Iterable[str], *, source: str | None = None) -> None:
        self.faults: list[str] = [faults] if isinstance(faults, str) else list(faults)
        self.source = source
        super().__init__(faults_message(self.faults, source))


class CheckpointError(MinitronError):
    """A checkpoint that is missing, truncated, foreign, or does not match what it claims to be."""


class ShapeError(MinitronError):
    """A model shape that does not exist, cannot be reached by pruning, or does not fit the parallel layout."""

    def __init__(self, faults: str | Iterable[str]) -> None:
        self.faults: list[str] = [faults] if isinstance(faults, str) else list(faults)
        super().__init__(faults_message(self.faults, None))


class DataError(MinitronError):
    """Data that is missing, empty, malformed, or does not fit the model."""


class NonFiniteError(MinitronError):
    """An activation, score or loss became NaN or infinite."""


class PreemptedError(MinitronError):
    """A signal asked for an end. The same command, given again, goes on or starts anew; the message says which.

    Exit code 75 is ``EX_TEMPFAIL`` of ``sysexits.h``: try again later.
    """

    exit_code = 75


class MissingDependency(MinitronError):
    """A package that this job needs is not installed."""


class FailedChecksError(MinitronError):
    """``minitron doctor``: what was checked on this machine does not hold."""

    exit_code = 1


def faults_message(faults: list[str], source: str | None) -> str:
    """One line for one fault; a counted list for several."""
    where = f"{source}: " if source else ""
    if len(faults) == 1:
        return where + faults[0]
    return "\n".join([f"{where}{len(faults)} faults:", *(f"  - {fault}" for fault in faults)])


def first_line(error: BaseException) -> str:
    """What a library's error says, as part of a line of ours: its first line that says anything, else its class."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line.rstrip(",") for line in lines if line), type(error).__name__)
