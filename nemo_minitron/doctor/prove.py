"""Run the checks in the layout, and the reference beside them, whatever becomes of single checks.

Every rank of the stage calls :func:`prove`. It leads one child process at a time, a group of checks each: a check that
raises, crashes or hangs ends the children of that attempt, is noted as failed, and new ones run what is left. Rank 0
also leads the reference, one process on the CPU, and compares.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from nemo_minitron.config import DoctorConfig
from nemo_minitron.doctor.checks import CHECKS, Row, compare
from nemo_minitron.doctor.process import Job
from nemo_minitron.doctor.ranks import Ranks, alone, of_environment
from nemo_minitron.runtime.files import read_json_lines
from nemo_minitron.runtime.launch import GRACE, LAUNCHER_VARIABLE

if TYPE_CHECKING:
    import torch

__all__ = ["Outcome", "Proof", "prove", "references"]

POLL = 0.1
#: Of the environment: what would make a child take itself for a rank of its leader's group.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")

Case = tuple[str, str]


@dataclass
class Outcome:
    """What became of a case on all ranks.

    Attributes:
        reason: why it failed; empty if it ran.
        seconds: of the slowest rank.
        details: of all ranks, merged.
    """

    reason: str = ""
    seconds: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Proof:
    """What :func:`prove` found.

    Attributes:
        rows: a row for each quantity of each check in each precision.
        bandwidth: of all-reduces: ``group, ranks, bytes, precision, seconds, bus_gb_per_s``.
        device: that the models were on, as torch names it.
        seconds: in all.
    """

    rows: list[Row]
    bandwidth: list[dict[str, Any]]
    device: str
    seconds: float

    @property
    def failed(self) -> list[Row]:
        """What does not hold."""
        return [row for row in self.rows if row.status == "failed"]


def prove(config: DoctorConfig, folder: Path, *, say: Callable[[str], None] = print) -> Proof | None:
    """Run the checks. Every rank calls it.

    Args:
        config: of the stage.
        folder: that all ranks see; gets the children's logs, and ``work/``, which is removed at the end.
        say: told, on rank 0, what is being done.

    Returns:
        What was found, on rank 0; None elsewhere.
    """
    started = time.monotonic()
    ranks = of_environment(config.runtime.collective_timeout_minutes)
    patience = 60 * (config.minutes + 5)
    work = folder / "work"
    if ranks.is_main:
        shutil.rmtree(work, ignore_errors=True)
        for old in folder.glob("check-*.log"):
            old.unlink()
        _make_material(config, work / "material")
        ranks.tell("material", True)
    ranks.wait("material", patience)
    cases, skipped = _cases(config)
    leader = _Leader(config, folder, work, ranks, patience, say if ranks.is_main else _silent)
    outcomes: dict[Case, Outcome] = {}
    reference = _Reference(config, folder, work, sorted({check for check, _ in cases}, key=list(CHECKS).index))
    for number, group in enumerate(dict.fromkeys(CHECKS[check].group for check, _ in cases)):
        outcomes |= leader.run(group, [case for case in cases if CHECKS[case[0]].group == group])
        if ranks.is_main and number == 0:
            reference.start()  # not beside the first group, whose bandwidth it would take
    if not ranks.is_main:
        return None
    say("the rest of the same in one process on the CPU")
    expected, missing = reference.result()
    rows = skipped
    for case in cases:
        rows += _rows(case, outcomes[case], work / "values", ranks.world, expected, missing)
    rows.sort(key=lambda row: list(CHECKS).index(row.check))
    bandwidth = [
        {**one, "precision": precision}
        for (_, precision), outcome in outcomes.items()
        for one in outcome.details.get("bandwidth", [])
    ]
    device = next((o.details["device"] for o in outcomes.values() if "device" in o.details), "")
    shutil.rmtree(work, ignore_errors=True)
    return Proof(rows, bandwidth, device, time.monotonic() - started)


def references(checks: Sequence[str], folder: Path, config: DoctorConfig | None = None) -> dict[str, dict[str, Any]]:
    """What checks must come near: made by one process on the CPU, in a layout of one.

    Args:
        checks: names.
        folder: gets ``material/``, unless it is there, logs and values.
        config: whose layout the material is for; None for a layout of one.

    Returns:
        Tensors of each check by quantity.

    Raises:
        RuntimeError: with the reason, if one could not be made.
    """
    config = config or DoctorConfig()
    if not (folder / "material").exists():
        _make_material(config, folder / "material")
    reference = _Reference(config, folder, folder, list(checks))
    reference.start()
    expected, missing = reference.result()
    if missing:
        raise RuntimeError("; ".join(f"{check}: {reason}" for check, reason in missing.items()))
    return expected


def _make_material(config: DoctorConfig, folder: Path) -> None:
    from nemo_minitron.doctor.material import make_material
    from nemo_minitron.runtime.groups import ParallelLayout

    make_material(folder, ParallelLayout(**vars(config.parallel)))


def _cases(config: DoctorConfig) -> tuple[list[Case], list[Row]]:
    """What is to be run, and rows for what cannot be."""
    cases: list[Case] = []
    skipped: list[Row] = []
    for name in config.chosen:
        check = CHECKS[name]
        reason = check.refuses(config.parallel)
        for precision in config.precision:
            if reason is None:
                cases.append((name, precision))
            else:
                skipped.append(Row(name, precision, "", "not run", reason=reason))
    return cases, skipped


@dataclass
class _Leader:
    """Runs groups of checks through child processes, one of which each rank has at a time."""

    config: DoctorConfig
    folder: Path
    work: Path
    ranks: Ranks
    patience: float
    say: Callable[[str], None]
    reference: bool = False

    def run(self, group: str, cases: list[Case]) -> dict[Case, Outcome]:
        """Run the cases of a group. Every rank calls it with the same ones, and gets the same outcomes."""
        found: dict[Case, Outcome] = {}
        for attempt in range(len(cases)):
            left = [case for case in cases if case not in found]
            if not left:
                break
            self.say(", ".join(dict.fromkeys(CHECKS[check].title for check, _ in left)))
            found |= self._attempt(f"{group}-{attempt}", left)
        return found

    def _attempt(self, name: str, cases: list[Case]) -> dict[Case, Outcome]:
        """One set of children: outcomes of the cases that they came to."""
        if self.ranks.is_main:
            self.ranks.tell(f"{name}/port", _free_port())
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
        return _merged(cases, self.ranks.gather(f"{name}/end", own, self.patience))

    def _watch(self, child: subprocess.Popen[bytes], events: Path, stop: str) -> str:
        """Wait for a child. Returns how it ended: "", or a reason."""
        limit, grace = 60 * self.config.minutes, None
        while child.poll() is None:
            time.sleep(POLL)
            now = time.time()
            since = max((line["time"] for line in read_json_lines(events)), default=None)
            since = psutil.Process(child.pid).create_time() if since is None and child.poll() is None else since
            if since is not None and now - since > limit:
                self.ranks.tell(stop, self.ranks.rank)
                return f"did not end within {self.config.minutes:g} minutes (minutes=)"
            if grace is None and self.ranks.told(stop) is not None:
                grace = now + GRACE
            elif grace is not None and now > grace:
                return "stopped, because another rank had failed"
        if child.returncode == 0:
            return ""
        self.ranks.tell(stop, self.ranks.rank)
        if child.returncode < 0:
            return f"was killed by {signal.Signals(-child.returncode).name}"
        return f"ended with exit code {child.returncode}"

    def _environment(self, port: int) -> dict[str, str]:
        """Of a child: a rank as its leader is, of a group that meets elsewhere; or a world of one."""
        env = dict(os.environ)
        env[LAUNCHER_VARIABLE] = f"{os.getpid()}:{psutil.Process().create_time()}"
        # Transformer Engine multiplies float32 matrices in TF32 (common/gemm/cublaslt_gemm.cu), which keeps ten bits.
        env.setdefault("NVIDIA_TF32_OVERRIDE", "0")
        # The leaders' own store has other things in it.
        env.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        if self.reference or self.ranks.world == 1:
            for name in _RANK_VARIABLES:
                env.pop(name, None)
            env = {name: value for name, value in env.items() if not name.startswith("TORCHELASTIC_")}
            if self.reference:
                env["CUDA_VISIBLE_DEVICES"] = ""
            return env
        env["MASTER_PORT"] = str(port)
        if env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]:
            env["MASTER_ADDR"] = "127.0.0.1"  # whatever this machine is called, and whether that resolves
        return env


class _Reference:
    """The reference of all checks, made by a thread of rank 0 that leads one process on the CPU."""

    def __init__(self, config: DoctorConfig, folder: Path, work: Path, checks: list[str]) -> None:
        self._cases = [(check, "float32") for check in checks]
        own = work / "reference"
        self._leader = _Leader(config, folder, own, alone(), 60.0, _silent, reference=True)
        self._material = work / "material"
        self._outcomes: dict[Case, Outcome] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._error: BaseException | None = None

    def start(self) -> None:
        """Begin."""
        self._leader.work.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (self._leader.work / "material").symlink_to(self._material.absolute())
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcomes = self._leader.run("reference", self._cases)
        except BaseException as error:
            self._error = error

    def result(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]:
        """Wait. Tensors by check and quantity, and why those that lack are lacking."""
        if self._thread.ident is not None:  # there may be nothing to check
            self._thread.join()
        if self._error is not None:
            raise self._error
        found: dict[str, dict[str, torch.Tensor]] = {}
        missing: dict[str, str] = {}
        for case, outcome in self._outcomes.items():
            if outcome.reason:
                missing[case[0]] = outcome.reason
            else:
                found[case[0]] = _values(self._leader.work / "values", case, 1)
        return found, missing


def _rows(
    case: Case,
    outcome: Outcome,
    values: Path,
    world: int,
    expected: dict[str, dict[str, torch.Tensor]],
    missing: dict[str, str],
) -> list[Row]:
    name, precision = case
    reason = outcome.reason
    if not reason and name not in expected:
        reason = f"there is no CPU reference: {missing.get(name, 'it was not made')}"
    if reason:
        return [Row(name, precision, "", "failed", seconds=outcome.seconds, reason=reason)]
    found = _values(values, case, world)
    return compare(CHECKS[name], precision, found, expected[name], seconds=outcome.seconds)


def _values(folder: Path, case: Case, world: int, *, patience: float = 30.0) -> dict[str, torch.Tensor]:
    """What all ranks measured, merged."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    deadline = time.monotonic() + patience  # a shared disk may show another node's file a little later
    for rank in range(world):
        path = folder / f"{case[0]}-{case[1]}.rank-{rank}.safetensors"
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(POLL)
        found |= load_file(path)
    return found


def _merged(cases: list[Case], ranks: list[dict[str, Any]]) -> dict[Case, Outcome]:
    """Outcomes of the cases that the children came to, from what each rank saw of its own.

    The same on all ranks. At least one case is among them: a child that died before the first counts against it.
    """
    by_case: list[dict[Case, dict[str, Any]]] = [
        {(line["check"], line["precision"]): line for line in rank["events"]} for rank in ranks
    ]
    found: dict[Case, Outcome] = {}
    for case in cases:
        last = [events.get(case) for events in by_case]
        if all(line is not None and line["event"] == "done" for line in last):
            details: dict[str, Any] = {}
            for line in last:
                details = {**(line or {})["details"], **details}
            found[case] = Outcome(seconds=max((line or {})["seconds"] for line in last), details=details)
        elif any(last):
            found[case] = Outcome(_reason(last, ranks))
    if not found:
        found[cases[0]] = Outcome(_reason([None] * len(ranks), ranks))
    return found


def _reason(last: Sequence[dict[str, Any] | None], ranks: list[dict[str, Any]]) -> str:
    """Why a case failed: what came first; a process that was killed comes before what its peers say of it."""
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


def _silent(text: str) -> None:
    del text
