"""A connection to a server of :mod:`nemo_minitron.jobs.warm_server`, and the processes that are forked over it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["WarmProcess", "WarmServer", "WarmUnavailable", "end_process"]

#: Seconds that a server may take to import what its level has.
START_LIMIT = 300.0


class WarmUnavailable(Exception):
    """No process can be forked here, for the reason in the message."""


class WarmProcess:
    """A process that a server forked, with the part of :class:`subprocess.Popen` that waits.

    Attributes:
        pid: of the process, which leads a session and a process group of this number.
        returncode: None while it runs, then its exit code, or minus the signal that killed it.
    """

    def __init__(self, server: WarmServer, pid: int) -> None:
        self._server = server
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Check whether it has ended."""
        if self.returncode is None:
            self._server.listen(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: if it runs for longer.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            rest = 1.0 if deadline is None else deadline - time.monotonic()
            if rest <= 0:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            self._server.listen(min(rest, 1.0))
        return self.returncode


class WarmServer:
    """A connection to a server that forks children for this process.

    Args:
        path: of the server's socket.
        process: the server, if this process started it; None if it belongs to another.

    Raises:
        WarmUnavailable: if the server ends before it listens, or does not in time.
    """

    def __init__(self, path: Path, process: subprocess.Popen[bytes] | WarmProcess | None = None) -> None:
        self.process = process
        self._path = path
        self._lock = threading.RLock()
        self._running: dict[int, WarmProcess] = {}
        self._buffer = b""
        self._answers: list[WarmProcess | str] = []  # a process, or why there is none
        self._socket: socket.socket | None = self._connect()

    def _connect(self) -> socket.socket:
        deadline = time.monotonic() + START_LIMIT
        while True:
            ended = self.process.poll() if self.process is not None else None
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(self._path))
                return connection
            except OSError as error:
                connection.close()
                if ended is not None or self.process is None or time.monotonic() > deadline:
                    log = self._path.with_suffix(".log")
                    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
                    if self.process is not None:
                        end_process(self.process)
                    raise WarmUnavailable(lines[-1] if lines else f"its server cannot be reached ({error})") from error
            time.sleep(0.02)

    def start(
        self, module: str, args: Sequence[str], *, environment: Mapping[str, str], cwd: Path, output: Path
    ) -> WarmProcess:
        """Fork a process that runs ``python -m module args``.

        Args:
            module: dotted name.
            args: its arguments.
            environment: the whole of it; see :class:`~nemo_minitron.jobs.warm.WarmPool` on what a server
                cannot change any more.
            cwd: working directory, and first entry of ``sys.path``.
            output: file that standard output and error are appended to. Standard input is empty.

        Raises:
            WarmUnavailable: if the server is gone, or may not fork.
        """
        request = {
            "module": module,
            "args": list(args),
            "environment": dict(environment),
            "cwd": str(cwd.absolute()),
            "output": str(output.absolute()),
        }
        with self._lock:
            if self._socket is None:
                raise WarmUnavailable("its server is gone")
            try:
                self._socket.sendall(json.dumps(request).encode() + b"\n")
            except OSError:
                self._lost()
            while not self._answers and self._socket is not None:
                self.listen(1.0)
            if not self._answers:
                raise WarmUnavailable("its server is gone")
            answer = self._answers.pop()
        if isinstance(answer, str):
            raise WarmUnavailable(answer)
        return answer

    def listen(self, seconds: float) -> None:
        """Read the server's messages, waiting up to ``seconds`` for one."""
        with self._lock:
            if self._socket is None or not select.select([self._socket], [], [], seconds)[0]:
                return
            try:
                data = self._socket.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                self._lost()
                return
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "ended" in message:
                    self._running.pop(message["ended"]).returncode = message["code"]
                elif "started" in message:
                    process = WarmProcess(self, message["started"])
                    self._running[process.pid] = process
                    self._answers.append(process)
                else:
                    self._answers.append(message["refused"])

    def _lost(self) -> None:
        """Handle the loss of the server, with which the kernel kills its children."""
        if self._socket is not None:
            self._socket.close()
        self._socket = None
        for process in self._running.values():
            process.returncode = -signal.SIGKILL
        self._running.clear()

    @property
    def is_alive(self) -> bool:
        """Whether it can fork further processes."""
        self.listen(0)
        return self._socket is not None

    def close(self) -> None:
        """End the connection and every process that was started over it, and the server if this process started it."""
        with self._lock:
            self._lost()
        if self.process is not None:
            end_process(self.process)


def end_process(process: subprocess.Popen[bytes] | WarmProcess) -> None:
    """Kill a process and all of its group, and wait for it."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
