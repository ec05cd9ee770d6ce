"""``python -m nemo_minitron.jobs.warm_server SOCKET DEVICE [MODULE ...]``: import once, then fork on request.

The server activates the CPU layer (DEVICE is ``auto`` or ``cpu``; ``-`` leaves torch out), imports the modules, listens
on a Unix socket and does nothing else: it has one thread and never runs what its children run. A request is one line of
JSON, ``{"module", "args", "environment", "cwd", "output"}``. It is answered by ``{"started": pid}`` or
``{"refused": reason}``, and later by ``{"ended": pid, "code": n}`` with the code that :mod:`subprocess` would give.
The child runs the module as ``python -m module args`` would. It is killed when the client that asked for it is gone,
and when the server is.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["main"]

PR_SET_PDEATHSIG = 1
#: Seconds between two looks whether the process that started the server still lives.
WATCH = 2.0
#: Signals that are meant for the children alone. Slurm sends some to every process of a job, also to those that the
#: children need until they have saved.
_FOR_CHILDREN = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
#: What a process starts with where nobody seeded torch (``c10::detail::default_rng_seed_val``).
TORCH_SEED = 67280421310721


@dataclass
class _Client:
    """A client's connection: the bytes of its next request, and the children that were forked for it."""

    connection: socket.socket
    buffer: bytes = b""
    children: set[int] = field(default_factory=set)

    def requests(self) -> list[dict[str, Any]] | None:
        """The complete requests that have arrived; None when the client is gone."""
        try:
            data = self.connection.recv(1 << 20)
        except (ConnectionError, OSError):
            data = b""
        if not data:
            return None
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def send(self, **message: Any) -> None:
        # One that is gone is noticed when its connection is read.
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")


class _Server:
    """The loop: accepts clients, forks, reports ends."""

    def __init__(self, path: Path, added: dict[str, str]) -> None:
        self.path, self.added = path, added
        self.parent = os.getppid()
        self.clients: list[_Client] = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        # A signal of a child's end wakes the loop.
        self.woken, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.descriptors = [self.woken, waker]
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self.handlers = {order: signal.signal(order, signal.SIG_IGN) for order in _FOR_CHILDREN}
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.selector.register(self.woken, selectors.EVENT_READ)

    def serve(self) -> None:
        """Serve until the process that started the server is gone."""
        while os.getppid() == self.parent:
            for key, _ in self.selector.select(WATCH):
                if key.fileobj is self.listener:
                    connection, _ = self.listener.accept()
                    client = _Client(connection)
                    self.clients.append(client)
                    self.selector.register(connection, selectors.EVENT_READ, client)
                elif key.data is not None:
                    self._hear(key.data)
                else:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self.woken, 1 << 12)
            self._reap()
        for client in self.clients:
            self._kill(client)
        shutil.rmtree(self.path.parent, ignore_errors=True)  # its owner cannot do it any more

    def _hear(self, client: _Client) -> None:
        requests = client.requests()
        if requests is None:
            self.selector.unregister(client.connection)
            client.connection.close()
            self.clients.remove(client)
            self._kill(client)
        for request in requests or ():
            if threads := _threads():
                client.send(refused=f"the server has more than one thread ({', '.join(threads)})")
            else:
                pid = self._fork(request)
                client.children.add(pid)
                client.send(started=pid)

    def _kill(self, client: _Client) -> None:
        for pid in client.children:
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError):
                    kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = ended
                for client in self.clients:
                    if pid in client.children:
                        client.children.discard(pid)
                        client.send(ended=pid, code=os.waitstatus_to_exitcode(status))

    def _fork(self, request: dict[str, Any]) -> int:
        """Fork a child; it leads a session of its own when this returns."""
        reading, writing = os.pipe()
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            _as_a_process(lambda: self._become(request, server, writing))
        os.close(writing)
        os.read(reading, 1)
        os.close(reading)
        return pid

    def _become(self, request: dict[str, Any], server: int, writing: int) -> None:
        """In the child: close the server's connections, and run the request's module."""
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:
            os._exit(1)
        os.close(writing)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for order, handler in self.handlers.items():
            signal.signal(order, handler if handler is not None else signal.SIG_DFL)
        self.selector.close()
        self.listener.close()
        for client in self.clients:
            client.connection.close()
        for descriptor in self.descriptors:
            os.close(descriptor)
        _take_on(request, self.added)
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


def _as_a_process(run: Callable[[], None]) -> NoReturn:
    """Call ``run`` and end this process as the interpreter would, but without clearing its memory object by object."""
    code = 0
    try:
        run()
    except SystemExit as error:
        if isinstance(error.code, int):
            code = error.code & 0xFF
        elif error.code is not None:
            print(error.code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        code = 128 + signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
    if code == 128 + signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)


def _take_on(request: dict[str, Any], added: dict[str, str]) -> None:
    """In the child: set output, directory, environment, and all that a new interpreter derives from them.

    Args:
        request: of the client.
        added: variables that the imports set; a value that the client sets itself wins.
    """
    null = os.open(os.devnull, os.O_RDONLY)
    log = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for old, new in ((null, 0), (log, 1), (log, 2)):
        os.dup2(old, new)
    os.close(null)
    os.close(log)
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment: dict[str, str] = request["environment"]
    os.environ.clear()
    os.environ.update(added | environment)
    os.chdir(request["cwd"])
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    # The first entry is the directory that `python -m` was called in.
    sys.path[:] = [request["cwd"], *paths, *(path for path in sys.path[1:] if path not in inherited)]
    sys.argv = [request["module"], *request["args"]]
    importlib.invalidate_caches()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=bool(environment.get("PYTHONUNBUFFERED")))  # type: ignore[union-attr]
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.set_num_threads(int(environment.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
        torch.manual_seed(TORCH_SEED)
    _tell_libraries()


def _tell_libraries() -> None:
    """Set the values that libraries read from the environment at import and that differ between children.

    Lightning and torchmetrics log and write on rank 0 alone, and remember the rank; nemo_run remembers its directory.
    """
    fabric = sys.modules.get("lightning.fabric.utilities.rank_zero")
    rank = (fabric._get_rank() if fabric else None) or 0
    for name in (
        "lightning_utilities.core.rank_zero",
        "lightning.fabric.utilities.rank_zero",
        "lightning_fabric.utilities.rank_zero",
        "torchmetrics.utilities.prints",
    ):
        if name in sys.modules:
            sys.modules[name].rank_zero_only.rank = rank
    if "nemo_run.config" in sys.modules and "NEMORUN_HOME" in os.environ:
        sys.modules["nemo_run.config"].set_nemorun_home(os.environ["NEMORUN_HOME"])


def _threads() -> list[str]:
    """Names of this process's threads, if it has more than one."""
    tasks = list(Path("/proc/self/task").iterdir())
    return [(task / "comm").read_text().strip() for task in tasks] if len(tasks) > 1 else []


def _import(device: str, modules: Sequence[str]) -> None:
    if device != "-":
        import torch

        from nemo_minitron.runtime import cpu

        torch.set_num_threads(1)
        if not cpu.needed(device):
            sys.exit("the stack runs on CUDA here, which a forked process cannot use")
        cpu.activate()
    for module in modules:
        importlib.import_module(module)


def main(argv: Sequence[str]) -> None:
    """Import, and serve until the process that started the server is gone."""
    path, device, *modules = argv
    before = dict(os.environ)
    _import(device, modules)
    added = {name: value for name, value in os.environ.items() if before.get(name) != value}
    if threads := _threads():
        sys.exit(f"the imports left more than one thread ({', '.join(threads)})")
    # What is there now is never garbage: the collector of a child would touch, and so copy, every page of it.
    gc.collect()
    gc.freeze()
    _Server(Path(path), added).serve()


if __name__ == "__main__":
    main(sys.argv[1:])
