"""What Slurm says of jobs: its queue, and its accounting for those that have left the queue."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["JobState", "job_states"]

#: Seconds that a command of Slurm may take.
_PATIENCE = 10.0
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
_RUNNING = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "STAGE_OUT", "SIGNALING", "RESIZING")


@dataclass(frozen=True)
class JobState:
    """A Slurm job.

    Attributes:
        job: its number.
        state: Slurm's name, such as "PENDING".
        reason: why it waits; empty where Slurm gives none.
        nodes: where it runs.
        exit_code: of its script, where the accounting tells; else None.
    """

    job: str
    state: str
    reason: str = ""
    nodes: str = ""
    exit_code: int | None = None

    @property
    def waits(self) -> bool:
        """Whether it is in the queue."""
        return self.state in _WAITING

    @property
    def runs(self) -> bool:
        """Whether it has its nodes."""
        return self.state in _RUNNING

    @property
    def is_live(self) -> bool:
        """Whether it waits or runs."""
        return self.waits or self.runs


def job_states(jobs: Iterable[str]) -> dict[str, JobState]:
    """The jobs that Slurm still knows, by number; none where Slurm's commands are missing or do not answer."""
    wanted = sorted({job for job in jobs if re.fullmatch(r"\d+", job)})
    states: dict[str, JobState] = {}
    if not wanted:
        return states
    # A job that has left the queue makes `squeue --jobs` fail: all are asked for, and those that count are taken.
    for line in _said("squeue", "--noheader", "--states=all", "--format=%i|%T|%r|%N"):
        job, state, reason, nodes = (line.split("|") + [""] * 4)[:4]
        if job in wanted:
            states[job] = JobState(job, state.split()[0] if state else "", "" if reason == "None" else reason, nodes)
    if gone := [job for job in wanted if job not in states]:
        asked = ("--noheader", "--parsable2", "--allocations", f"--jobs={','.join(gone)}")
        for line in _said("sacct", *asked, "--format=JobID,State,ExitCode,NodeList"):
            job, state, code, nodes = (line.split("|") + [""] * 4)[:4]
            if job in gone and state:
                number = code.partition(":")[0]
                states[job] = JobState(job, state.split()[0], "", nodes, int(number) if number.isdigit() else None)
    return states


def _said(program: str, *arguments: str) -> Sequence[str]:
    """The lines that a command prints; none where it fails."""
    place = shutil.which(program)
    if place is None:
        return ()
    try:
        done = subprocess.run([place, *arguments], capture_output=True, text=True, timeout=_PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return done.stdout.splitlines()
