"""One rank of the proof: it leads child processes that run the checks, and survives if one crashes or hangs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from nemo_minitron.config import DoctorConfig
from nemo_minitron.doctor.checks import CHECKS
from nemo_minitron.doctor.process import Job
from nemo_minitron.doctor.ranks import Ranks
from nemo_minitron.jobs.launch import GRACE, launched_here
from nemo_minitron.runtime.environment import local_environment
from nemo_minitron.runtime.files import read_json_lines

__all__ = ["Case", "Leader", "Outcome", "merged"]

POLL = 0.1

Case = tuple[str, str]
"""A check and a precision."""


@dataclass
class Outcome:
    """The outcome of a case (a check in a precision) on all ranks.

    Attributes:
        reason: why it failed; empty if it ran.
        seconds: of the slowest rank.
        details: of all ranks, merged.
    """

    reason: str = ""
    seconds: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Leader:
    """Runs groups of checks through child processes, one of which each rank has at a time."""

    config: DoctorConfig
    folder: Path
    work: Path
    ranks: Ranks
    patience: float
    say: Callable[[str], None]
    reference: bool = False

    def run(self, group: str, cases: list[Case]) -> dict[Case, Outcome]:
        """Run the cases of a group. Every rank calls it with the same cases and gets the same outcomes."""
        outcomes: dict[Case, Outcome] = {}
        for attempt in range(len(cases)):
            left = [case for case in cases if case not in outcomes]
            if not left:
                break
            self.say(", ".join(dict.fromkeys(CHECKS[check].title for check, _ in left)))
            outcomes |= self._attempt(f"{group}-{attempt}", left)
        return outcomes

    def _attempt(self, name: str, cases: list[Case]) -> dict[Case, Outcome]:
        """Run one set of children; returns the outcomes of the cases that they reached."""
        if self.ranks.is_main:
            self.ranks.publish(f"{name}/port", _free_port())
        port = self.ranks.wait(f"{name}/port", self.patience)
        self.work.mkdir(parents=True, exist_ok=True)
        stem = self.work / f"{name}.rank-{self.ranks.rank}"
        log = self.folder / f"check-{name}.rank-{self.ranks.rank}.log"
        events = stem.with_name(stem.name + ".events")
        events.unlink(missing_ok=True)
        Job(
            cases=cases,
            folder=str(self.work / "material"),
            scratch=str(self.work / "scratch"),
            values=str(self.work / "values"),
            events=str(events),
            layout=dataclasses.asdict(self.config.parallel),
            device="cpu" if self.reference else self.config.runtime.device,
            reference=self.reference,
            seed=self.config.runtime.seed,
            timeout_minutes=min(self.config.runtime.collective_timeout_minutes, self.config.minutes),
        ).write(stem.with_name(stem.name + ".json"))
        with log.open("wb") as output:
            child = subprocess.Popen(
                [sys.executable, "-m", "nemo_minitron.doctor.process", str(stem.with_name(stem.name + ".json"))],
                env=self._environment(port),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                ended = self._watch(child, events, f"{name}/stop")
            finally:
                if child.poll() is None:
                    _end(child)
        own = {"events": read_json_lines(events), "ended": ended, "log": str(log)}
        return merged(cases, self.ranks.gather(f"{name}/end", own, self.patience))

    def _watch(self, child: subprocess.Popen[bytes], events: Path, stop: str) -> str:
        """Wait for a child. Returns "" if it succeeded, otherwise the reason why it ended."""
        limit, grace = 60 * self.config.minutes, None
        while child.poll() is None:
            time.sleep(POLL)
            now = time.time()
            since = max((line["time"] for line in read_json_lines(events)), default=None)
            since = psutil.Process(child.pid).create_time() if since is None and child.poll() is None else since
            if since is not None and now - since > limit:
                self.ranks.publish(stop, self.ranks.rank)
                return f"did not end in time (minutes={self.config.minutes:g})"
            if grace is None and self.ranks.read(stop) is not None:
                grace = now + GRACE
            elif grace is not None and now > grace:
                return "stopped, because another rank had failed"
        if child.returncode == 0:
            return ""
        self.ranks.publish(stop, self.ranks.rank)
        if child.returncode < 0:
            return f"was killed by {signal.Signals(-child.returncode).name}"
        return f"ended with exit code {child.returncode}"

    def _environment(self, port: int) -> dict[str, str]:
        """Environment of a child: its leader's rank in a group with another port, or a world of one process."""
        env = dict(os.environ)
        env |= launched_here()
        # Transformer Engine multiplies float32 matrices in TF32 (common/gemm/cublaslt_gemm.cu), which keeps ten bits.
        env.setdefault("NVIDIA_TF32_OVERRIDE", "0")
        # The leaders' own store has other things in it.
        env.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        if self.reference or self.ranks.world == 1:
            env = local_environment(env)
            if self.reference:
                env["CUDA_VISIBLE_DEVICES"] = ""
            return env
        env["MASTER_PORT"] = str(port)
        if env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]:
            env["MASTER_ADDR"] = "127.0.0.1"  # whatever this machine is called, and whether that resolves
        return env


def merged(cases: list[Case], ranks: list[dict[str, Any]]) -> dict[Case, Outcome]:
    """Outcomes of the cases that the children reached, from the reports of each rank about its own child.

    The same on all ranks. It has at least one case: if a child died before the first case, that case has failed.
    """
    by_case: list[dict[Case, dict[str, Any]]] = [
        {(line["check"], line["precision"]): line for line in rank["events"]} for rank in ranks
    ]
    outcomes: dict[Case, Outcome] = {}
    for case in cases:
        last = [events.get(case) for events in by_case]
        if all(line is not None and line["event"] == "done" for line in last):
            details: dict[str, Any] = {}
            for line in last:
                details = {**(line or {})["details"], **details}
            outcomes[case] = Outcome(seconds=max((line or {})["seconds"] for line in last), details=details)
        elif any(last):
            outcomes[case] = Outcome(_reason(last, ranks))
    if not outcomes:
        outcomes[cases[0]] = Outcome(_reason([None] * len(ranks), ranks))
    return outcomes


def _reason(last: Sequence[dict[str, Any] | None], ranks: list[dict[str, Any]]) -> str:
    """Why a case failed: the first fault. A killed process counts before the errors that it causes on its peers."""
    said = sorted(
        (line["time"], rank) for rank, line in enumerate(last) if line is not None and line["event"] == "failed"
    )
    killed = [rank for rank, state in enumerate(ranks) if state["ended"].startswith(("was killed", "did not end"))]
    if killed:
        rank, why = killed[0], ranks[killed[0]]["ended"]
    elif said:
        rank = said[0][1]
        why = (last[rank] or {})["message"]
    else:
        ended = [rank for rank, state in enumerate(ranks) if state["ended"]]
        rank = ended[0] if ended else 0
        why = ranks[rank]["ended"] or "not all ranks ran it"
    where = f"rank {rank}: " if len(ranks) > 1 else ""
    return f"{where}{why} (log: {ranks[rank]['log']})"


def _end(child: subprocess.Popen[bytes]) -> None:
    """Terminate a child; kill it if it does not go."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(child.pid).children(recursive=True), psutil.Process(child.pid)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.terminate()
        for member in psutil.wait_procs(family, timeout=3)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    child.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
