"""Start the processes of a job, show rank 0's output, and limit their time.

One process is started as it is, several through torchrun on nemo_run's local executor
(:mod:`nemo_minitron.jobs.torchrun`); a caller may bring another way (:mod:`nemo_minitron.jobs.ranks`). A job has a
folder, which the launcher empties first::

    rank-0.log, rank-1.log, ...    what each rank printed
    rank-0.json, rank-1.json, ...  the result of each rank: a :class:`~nemo_minitron.jobs.results.RankResult`
    rank-0.pid, rank-1.pid, ...    its process; SIGUSR2 to it writes the stack of each of its threads to its log
    launcher.log                   what torchrun and nemo_run printed
    nemo_run/                      nemo_run's own records (NEMORUN_HOME)

Each rank calls :func:`attach` when it starts and :func:`~nemo_minitron.jobs.results.save_result` when it ends. Exit
codes carry no message, and torchrun and nemo_run replace them by their own; so results are read from the files
(:mod:`nemo_minitron.jobs.results`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import psutil

from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs.results import ATTEMPT_VARIABLE, RankResult, read_results, verdict
from nemo_minitron.jobs.stalls import StallWatch
from nemo_minitron.runtime.environment import local_environment, threads_each
from nemo_minitron.runtime.stopping import FOLDER_VARIABLE, Relay

__all__ = [
    "Processes",
    "Starter",
    "attach",
    "clear_folder",
    "end_with_launcher",
    "is_alive",
    "launched_here",
    "launch",
]

LAUNCHER_VARIABLE = "MINITRON_LAUNCHER"
#: Seconds that the other ranks get to end by themselves once one has failed.
GRACE = 10.0
POLL = 0.1


def attach(folder: Path) -> int:
    """Called by a rank at its start: redirect its output to its log, and end it when the launcher ends.

    Returns:
        The rank, from the environment that torchrun sets.
    """
    rank = int(os.environ.get("RANK", "0"))
    if LAUNCHER_VARIABLE in os.environ:  # a cluster's launcher ends its processes itself
        end_with_launcher()
    log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
    (folder / f"rank-{rank}.pid").write_text(str(os.getpid()))
    return rank


def launched_here() -> dict[str, str]:
    """The variable by which a process that this one starts knows its launcher (:func:`end_with_launcher`)."""
    return {LAUNCHER_VARIABLE: f"{os.getpid()}:{psutil.Process().create_time()}"}


def end_with_launcher(clear: Path | None = None) -> None:
    """End this process when the launcher is gone, so that killing ``minitron`` leaves no processes behind.

    A thread checks twice a second. Linux's parent-death signal would reach only the launcher's own child, not the
    ranks below torchrun, and torchx's handler of it leaves torchrun running.

    Args:
        clear: a directory of the launcher's that is removed then, as nobody else will.
    """
    pid, born = os.environ[LAUNCHER_VARIABLE].split(":")

    def watch() -> None:
        while is_alive(int(pid), float(born)):
            time.sleep(0.5)
        if clear is not None:
            shutil.rmtree(clear, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def is_alive(pid: int, born: float) -> bool:
    """Whether the process that was started at ``born`` still runs, and its number is not another process's."""
    try:
        process = psutil.Process(pid)
        # the time of a start is derived from the host's clock, which may be set right in between
        return abs(process.create_time() - born) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Processes(Protocol):
    """The processes of a job, whatever started them.

    Attributes:
        returncode: None while any of them runs; then an exit code, or minus a signal.
    """

    returncode: int | None

    @property
    def pids(self) -> list[int]:
        """Process ids to end, with all their children, in order to end the job."""

    @property
    def first_failure(self) -> tuple[int, int] | None:
        """``(rank, exit code)`` of the rank that failed first, if known."""

    def poll(self) -> int | None:
        """Check whether they have ended."""

    def wait(self) -> int:
        """Wait for their end."""


class Starter(Protocol):
    """A function that starts the processes of a job, or returns None to let :func:`launch` start them."""

    def __call__(
        self, module: str, args: Sequence[str], *, world_size: int, environment: dict[str, str], log: Path
    ) -> Processes | None:
        """Start ``python -m module args`` on every rank.

        Args:
            module, args, world_size: see :func:`launch`.
            environment: of all ranks, without the variables that differ between them.
            log: file for what a rank prints before :func:`attach`.
        """


class _Started(subprocess.Popen[bytes]):
    """A process, or torchrun with its ranks below it."""

    first_failure = None  # torchrun writes it to its log

    @property
    def pids(self) -> list[int]:
        return [self.pid]


def launch(
    module: str,
    args: Sequence[str],
    *,
    world_size: int,
    folder: Path,
    threads: int | None = None,
    timeout_minutes: float | None = None,
    on_output: Callable[[bytes], None] | None = None,
    starter: Starter | None = None,
) -> list[RankResult]:
    """Run ``python -m module args`` on ``world_size`` processes of this machine and wait.

    Args:
        module: takes its folder from :func:`job_folder`, calls :func:`attach` and
            :func:`~nemo_minitron.jobs.results.save_result`.
        args: words without blanks or quotes (torchx quotes them without a shell to undo it).
        world_size: number of processes.
        folder: the job's folder; files of an earlier job are removed.
        threads: of each process; None shares the cores that this process may use.
        timeout_minutes: the job is stopped after this; None for no limit.
        on_output: called with what rank 0 prints, as it comes.
        starter: tried first to start the processes.

    Returns:
        The results by rank, all "done".

    Raises:
        MinitronError: (the class that the rank raised) if a rank refused the job, or on a timeout.
        PreemptedError: after SIGTERM or SIGUSR1, which is forwarded to ranks that can stop in good order.
        StageCrashError: if a rank crashed, or ended without a result.
    """
    folder = folder.absolute()
    clear_folder(folder)
    threads = threads or threads_each(world_size)
    command = [sys.executable, "-m", module, *args]
    if world_size > 1:
        command = [sys.executable, "-m", "nemo_minitron.jobs.torchrun", str(world_size), module, *args]
    started = time.monotonic()
    environment, path = _environment(folder, threads), folder / "launcher.log"
    process: Processes | None = None
    if starter is not None:
        process = starter(module, args, world_size=world_size, environment=environment, log=path)
    with path.open("ab") as log:
        if process is None:
            process = _Started(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # an interrupt reaches us alone, and we end the rest in order
            )
        tail, stall = _Tail(folder / "rank-0.log", on_output), StallWatch(folder)
        limit = None if timeout_minutes is None else started + 60 * timeout_minutes
        timed_out = False
        try:
            with Relay(folder) as relay:
                timed_out = _wait(process, folder, limit, world_size, tail, relay, stall)
        finally:
            if process.poll() is None:
                _end(process)
            tail.step()
            _log_failures(folder)
    if timed_out:
        raise MinitronError(
            f"stopped after {timeout_minutes:g} minutes (runtime.timeout_minutes); raise the limit or set it to null. "
            f"Logs: {folder}"
        )
    return verdict(folder, world_size, process.returncode or 0, process.first_failure)


def job_folder() -> Path:
    """The folder of the job that this process belongs to."""
    return Path(os.environ[FOLDER_VARIABLE])


def clear_folder(folder: Path) -> None:
    """Remove the files of an earlier job; other files in the folder stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in ("rank-*.log", "rank-*.json", "rank-*.pid", ".rank-*.partial.*", "rank-*.stoppable", "launcher.log"):
        for stale in folder.glob(pattern):
            stale.unlink()
    shutil.rmtree(folder / "nemo_run", ignore_errors=True)
    (folder / "nemo_run").mkdir()


def _environment(folder: Path, threads: int) -> dict[str, str]:
    """This process's environment, with the variables that the job's processes need."""
    keep = local_environment(os.environ)
    keep.pop(ATTEMPT_VARIABLE, None)  # of a rank that leads this job
    interpreter = str(
        Path(sys.executable).parent
    )  # torchrun is found there even where the environment is not activated
    keep |= {
        FOLDER_VARIABLE: str(folder),
        **launched_here(),
        "NEMORUN_HOME": str(folder / "nemo_run"),
        "OMP_NUM_THREADS": str(threads),
        "PATH": os.pathsep.join([interpreter, os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",  # NeMo-Aligner's bars, among others: stages show their own
        "LOGLEVEL": "WARNING",  # torchrun's
    }
    if sys.stderr.isatty() and sys.stdout.isatty():  # rank 0 writes to a file that is shown on this terminal
        keep |= {"TTY_COMPATIBLE": "1", "COLUMNS": str(shutil.get_terminal_size().columns)}
    return keep


class _Tail:
    """Passes on what is appended to a file."""

    def __init__(self, path: Path, on_output: Callable[[bytes], None] | None) -> None:
        self.path, self.on_output, self.offset = path, on_output, 0

    def step(self) -> None:
        """Pass on what was appended since the last step."""
        if self.on_output is None or not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read()
        self.offset += len(data)
        if data:
            self.on_output(data)


def _wait(
    process: Processes,
    folder: Path,
    limit: float | None,
    world_size: int,
    tail: _Tail,
    relay: Relay,
    stall: StallWatch,
) -> bool:
    """Wait until the processes end or must be ended: by the time limit (True), a failed rank, or a job that lingers."""
    deadline = None
    while process.poll() is None:
        time.sleep(POLL)
        tail.step()
        relay.step()
        now = time.monotonic()
        if (report := stall.step(now)) is not None and tail.on_output is not None:
            tail.on_output(f"{report}\n".encode())
        if limit is not None and now > limit:
            return True
        if deadline is not None:
            if now > deadline:
                return False
            continue
        results = read_results(folder)
        if any(result.status != "done" for result in results):
            deadline = now + GRACE
        elif len(results) == world_size:
            deadline = now + 6 * GRACE
    return False


def _log_failures(folder: Path) -> None:
    """Add to the log of each failed rank why it failed. Ranks do not, since the terminal shows the log of rank 0."""
    for result in read_results(folder):
        if result.status != "done":
            with contextlib.suppress(OSError), (folder / f"rank-{result.rank}.log").open("a") as log:
                log.write(f"{result.status}: {result.message}\n")


def _end(process: Processes) -> None:
    """Terminate the processes of a job and all below them; kill what does not go in time."""
    family: list[psutil.Process] = []
    for pid in process.pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            family += [*root.children(recursive=True), root]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.terminate()
    _, alive = psutil.wait_procs(family, timeout=5)
    for member in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(alive, timeout=5)
    process.wait()
