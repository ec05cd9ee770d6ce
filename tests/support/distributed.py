"""One helper for every test that needs several processes: gloo, a time limit, a log for each rank.

The function under test runs in processes of its own, which load the test's file by path, activate the CPU layer and
call it; it finds its rank in the environment as under torchrun. Whatever it returns (JSON-like, or tensors) comes back
by rank. The processes are forked from a parent that has imported what the file needs (:mod:`nemo_minitron.jobs.warm`),
or are fresh interpreters where that cannot be, and under ``MINITRON_COLD=1``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.jobs.warm import current_pool
from nemo_minitron.jobs.warm_client import WarmProcess

__all__ = ["free_ports", "level_of", "next_port", "run_distributed", "start_rank"]

TESTS = Path(__file__).resolve().parents[1]
SPARE_PORTS = 8
#: What in a test's file shows that its ranks import this much.
_LEVELS = {
    "aligner": r"nemo_aligner|nemo_minitron\.alignment|import alignment",
    "nemo": r"\b(from|import) nemo\b|\blightning\b|distillation\.(recipe|module|training|language_model)|nemo2",
}


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the kernel gives to outgoing connections."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 1_000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise AssertionError(f"{count} free ports are needed, {len(found)} were found")


def next_port() -> None:
    """In every process of :func:`run_distributed`: meet at another port in the next process group of the same life.

    The store of the last one may not be gone everywhere.
    """
    spare = os.environ["SPARE_PORTS"].split()
    os.environ["MASTER_PORT"] = spare.pop(0)
    os.environ["SPARE_PORTS"] = " ".join(spare)


def run_distributed(
    function: Callable[..., Any], world: int, tmp_path: Path, *, timeout: float = 240.0, **kwargs: Any
) -> list[Any]:
    """Call ``function(**kwargs)`` in ``world`` processes and return what each returned, by rank.

    Raises:
        AssertionError: a process failed or the time ran out; the message holds the end of every rank's log.
    """
    out = tmp_path / f"{function.__name__}-{world}-{time.monotonic_ns()}"
    out.mkdir(parents=True)
    torch.save(kwargs, out / "kwargs.pt")
    port, *spare = free_ports(1 + SPARE_PORTS)
    file = function.__code__.co_filename
    processes: list[subprocess.Popen[bytes] | WarmProcess] = []
    for rank in range(world):
        env = dict(
            os.environ,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            SPARE_PORTS=" ".join(map(str, spare)),
            OMP_NUM_THREADS="1",
            TQDM_DISABLE="1",  # as in a stage
            PYTHONPATH=os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
        )
        args, log = [file, function.__name__, str(out)], out / f"rank{rank}.log"
        processes.append(start_rank(level_of(Path(file)), "support.distributed", args, env, out, log))
    deadline = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in processes):
            if time.monotonic() > deadline or any(process.poll() not in (None, 0) for process in processes):
                break
            time.sleep(0.1)
        # A rank that failed leaves the others waiting for it: give them a moment, then stop them.
        grace = time.monotonic() + 5
        while time.monotonic() < grace and any(process.poll() is None for process in processes):
            time.sleep(0.1)
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):  # it has ended since
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if any(codes):
        logs = "\n".join(
            f"--- rank {rank} (exit {codes[rank]})\n" + _tail(out / f"rank{rank}.log") for rank in range(world)
        )
        raise AssertionError(f"{function.__name__} on {world} processes failed or ran over {timeout} s\n{logs}")
    if None in codes:
        logs = "\n".join(f"--- rank {rank}\n" + _tail(out / f"rank{rank}.log") for rank in range(world))
        raise AssertionError(f"{function.__name__} on {world} processes ran over {timeout} s\n{logs}")
    return [torch.load(out / f"result{rank}.pt", weights_only=False) for rank in range(world)]


def start_rank(
    level: str, module: str, args: list[str], env: dict[str, str], cwd: Path, log: Path
) -> subprocess.Popen[bytes] | WarmProcess:
    """``python -m module args``, forked if the session has a pool (tests/conftest.py) and it can."""
    pool = current_pool()
    process = pool and pool.start(level, module, args, environment=env, cwd=cwd, output=log)
    if process is not None:
        return process
    with log.open("wb") as stream:
        command = [sys.executable, "-m", module, *args]
        return subprocess.Popen(
            command, env=env, stdout=stream, stderr=subprocess.STDOUT, cwd=cwd, start_new_session=True
        )


@functools.cache
def level_of(file: Path) -> str:
    """The level of :data:`~nemo_minitron.jobs.warm.LEVELS` that has what a test's file and its helpers import."""
    read: dict[Path, str] = {}
    waiting = [file]
    while waiting:
        path = waiting.pop()
        if path in read:
            continue
        read[path] = path.read_text(encoding="utf-8")
        helpers = set(re.findall(r"\bsupport\.(\w+)", read[path])) - {"distributed"}
        waiting += [TESTS / "support" / f"{name}.py" for name in helpers if (TESTS / "support" / f"{name}.py").exists()]
    for level, pattern in _LEVELS.items():
        if any(re.search(pattern, text) for text in read.values()):
            return level
    return "megatron"


def _tail(path: Path, lines: int = 40) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def _main() -> None:
    file, name, out = sys.argv[1:]
    from nemo_minitron.runtime import cpu

    torch.set_num_threads(1)
    cpu.prepare()
    spec = importlib.util.spec_from_file_location("distributed_case", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["distributed_case"] = module
    spec.loader.exec_module(module)
    kwargs = torch.load(Path(out) / "kwargs.pt", weights_only=False)
    result = getattr(module, name)(**kwargs)
    torch.save(result, Path(out) / f"result{os.environ['RANK']}.pt")
    sys.stdout.flush()
    # Interpreter shutdown after gloo and Megatron can take seconds and has nothing left to test.
    os._exit(0)


if __name__ == "__main__":
    _main()
