"""The command ``minitron`` as a soak test starts it: warm, and with a fault on order."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from soak.hook import VARIABLE

from nemo_minitron.jobs.warm import LEVELS, WarmPool
from nemo_minitron.jobs.warm_client import WarmProcess

__all__ = ["Order", "Program", "Result", "programs"]

#: Seconds that one command may take, and the processes of one that was killed to notice it.
LIMIT, NOTICE = 300.0, 10.0
_MARK = "MINITRON_SOAK_MARK"


@dataclass(frozen=True)
class Order:
    """A fault that is to come while a command runs.

    Attributes:
        at: number of the change to the run's directory before which it comes, from 1; 0 for none.
        whom: "launcher", "self", "all", "disk" or "limit"; see :mod:`soak.hook`.
        signal: what the process gets.
        after: milliseconds from that change to the fault.
        size: bytes of a file, for "limit".
    """

    at: int
    whom: str = "launcher"
    signal: int = signal.SIGKILL
    after: float = 0.0
    size: int = 0


@dataclass(frozen=True)
class Result:
    """How a command ended.

    Attributes:
        code: its exit code, or minus the signal that ended it.
        text: what it printed.
        changes: how many changes it made to the run's directory; 0 where nobody counted.
        left: its processes and temporary directories that were there after it, and did not go in time.
    """

    code: int
    text: str
    changes: int
    left: tuple[str, ...]

    @property
    def message(self) -> str:
        """What it said on the way out, without the lines of the stages."""
        return self.text[self.text.rfind("minitron: ") :] if "minitron: " in self.text else ""


class Program:
    """Starts commands from warm servers that live as long as this does.

    Args:
        home: for its temporary files; commands run there.
        pool: of the servers.
    """

    def __init__(self, home: Path, pool: WarmPool) -> None:
        self.home, self.pool = home, pool
        self._number = 0

    def start(self, *words: str, folder: Path | None = None, order: Order | None = None) -> tuple[WarmProcess, Path]:
        """Start ``minitron words``; returns the process and the file that it prints to."""
        self._number += 1
        output, counter = self.home / f"said-{self._number}", self.home / "changes"
        counter.unlink(missing_ok=True)
        environment = {**os.environ, "COLUMNS": "400", "PYTHONUNBUFFERED": "1"}
        if folder is not None:
            order = order or Order(0)
            plan = dataclasses.asdict(order) | {"folder": str(folder), "counter": str(counter)}
            environment[VARIABLE] = json.dumps(plan)
        process = self.pool.start(
            "torch", "nemo_minitron", words, environment=environment, cwd=self.home, output=output
        )
        assert process is not None, "no warm server"
        return process, output

    def run(
        self,
        *words: str,
        folder: Path | None = None,
        order: Order | None = None,
        meanwhile: Callable[[WarmProcess], None] | None = None,
    ) -> Result:
        """Run ``minitron words`` to its end.

        Args:
            words: arguments.
            folder: whose changes are counted.
            order: the fault that is to come.
            meanwhile: called once it runs.
        """
        process, output = self.start(*words, folder=folder, order=order)
        if meanwhile is not None:
            meanwhile(process)
        code = process.wait(LIMIT)
        left = self._orphans()
        text = output.read_text(errors="replace") if output.exists() else ""
        output.unlink(missing_ok=True)
        counter = self.home / "changes"
        return Result(code, text, counter.stat().st_size if counter.exists() else 0, left)

    def run_cold(self, *words: str, after: float, number: int) -> Result:
        """Run ``minitron words`` as a user does, in a fresh interpreter with servers of its own, and send a signal.

        Args:
            words: arguments.
            after: seconds from the start to the signal, which only the command itself gets.
            number: of the signal.
        """
        output, mark = self.home / "said-cold", uuid.uuid4().hex
        environment = {**os.environ, "COLUMNS": "400", _MARK: mark}
        with output.open("wb") as stream:
            command = [sys.executable, "-m", "nemo_minitron", *words]
            process = subprocess.Popen(
                command, env=environment, cwd=self.home, stdout=stream, stderr=stream, start_new_session=True
            )
        try:
            code = process.wait(after)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            code = process.wait(LIMIT)
        left = _ended(lambda: _marked(mark))
        folders = Path(os.environ["TMPDIR"])
        left += _ended_paths(folders)
        return Result(code, output.read_text(errors="replace"), 0, left)

    def _orphans(self) -> tuple[str, ...]:
        """Processes that outlive their command; they are ended."""
        return _ended(self._forked) + _ended_paths(Path(os.environ["TMPDIR"]))

    def _forked(self) -> list[psutil.Process]:
        servers = {server.process.pid for server in self.pool._opened if server.process is not None}
        return [
            process
            for process in psutil.Process().children(recursive=True)
            if process.pid not in servers and process.status() != psutil.STATUS_ZOMBIE
        ]


def _ended(running: Callable[[], list[psutil.Process]]) -> tuple[str, ...]:
    """Wait for the processes to end; those that do not are named and killed."""
    deadline = time.monotonic() + NOTICE
    while (left := running()) and time.monotonic() < deadline:
        time.sleep(0.05)
    named = []
    for process in left:
        try:
            named.append(f"process {process.pid} {' '.join(process.cmdline())[:200]}")
            process.kill()
        except psutil.NoSuchProcess:
            continue
    return tuple(named)


def _ended_paths(folder: Path) -> tuple[str, ...]:
    """Wait for temporary directories to be removed; those that are not are named and removed."""
    deadline = time.monotonic() + NOTICE
    while (left := list(folder.glob("minitron-*"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return tuple(map(str, left))


def _marked(mark: str) -> list[psutil.Process]:
    """Processes whose first environment, or that of what forked them, has the mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


@contextmanager
def programs(home: Path, level: str = "aligner") -> Iterator[Program]:
    """The command, with the hook in all its processes. Only one at a time.

    Args:
        home: for temporary files.
        level: of the servers (:data:`~nemo_minitron.jobs.warm.LEVELS`), up to which stages start warm.
    """
    home.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).resolve().parents[1]
    tempfile.gettempdir()  # where this process's own temporary files go, whatever TMPDIR is from now on
    temporary = home / "tmp"
    temporary.mkdir(exist_ok=True)
    changed = {
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
        "MINITRON_SOAK_SERVER": "1",
        "TMPDIR": str(temporary),
        "TQDM_DISABLE": "1",  # as the launcher sets it, so that its stages may use these servers
    }
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    levels = {**LEVELS, "torch": dataclasses.replace(LEVELS["torch"], modules=("soak.hook",))}
    pool = WarmPool("cpu", levels)
    try:
        pool.server(level, os.environ)
        yield Program(home, pool)
    finally:
        pool.close()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(temporary, ignore_errors=True)
