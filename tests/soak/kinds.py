"""Kinds of faults: each disturbs a run at random, and lets it converge."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from soak.bench import Bench, Fault, check_refusal
from soak.machine import explore
from soak.program import Order

__all__ = ["KINDS", "WEIGHTS", "can_mount"]

#: Exit codes of a command whose own process got the signal, or one of whose stages did.
#: A forked process ends as by SIGINT where a fresh interpreter ends with 130.
_ENDS = {signal.SIGKILL: (0, -9), signal.SIGTERM: (0, 75), signal.SIGINT: (0, 130, -2)}


def kill(bench: Bench, rng: random.Random) -> str:
    """Signals at random changes of files, up to three runs after each other."""
    bench.clear()
    return f"{_kills(bench, rng)}; removed {bench.converge()}"


def kill_cold(bench: Bench, rng: random.Random) -> str:
    """A signal at a random time to a command with processes of its own, as a user starts it."""
    bench.clear()
    after, number = rng.uniform(0.3, 30), rng.choice(tuple(_ENDS))
    result = bench.program.run_cold("run", str(bench.pipeline), after=after, number=number)
    # Before Python has its handlers, and after it has taken them away, a signal ends it as any program.
    check_refusal(result, allowed=(*_ENDS[number], -number))
    return f"{number.name} after {after:.1f} s: {result.code}; removed {bench.converge()}"


def machine(bench: Bench, rng: random.Random) -> str:
    """The state machine, from the beginning."""
    home = bench.home / "machine"
    shutil.rmtree(home, ignore_errors=True)
    return explore(home, bench.program, rng.getrandbits(32), examples=5, steps=12)


def flip(bench: Bench, rng: random.Random) -> str:
    """A random bit, or cut, of a random file of a finished run."""
    bench.finished()
    said = damage(bench.run, rng)
    return f"{said}; removed {bench.converge()}"


def flip_unfinished(bench: Bench, rng: random.Random) -> str:
    """A random bit, or cut, of a random file that a killed run left."""
    bench.clear()
    said = _kills(bench, rng, at_most=1)
    if bench.run.exists() and _files(bench.run):
        said += f"; {damage(bench.run, rng)}"
    return f"{said}; removed {bench.converge()}"


def full(bench: Bench, rng: random.Random) -> str:
    """No file can be opened for writing from a random change on; then all is well again."""
    bench.clear()
    order = Order(rng.randint(1, bench.changes), "disk")
    result = bench.start(order=order)
    check_refusal(result, allowed=(0, 2))
    return f"no space from change {order.at}, exit code {result.code}; removed {bench.converge()}"


def limited(bench: Bench, rng: random.Random) -> str:
    """No file can grow beyond a random size, from a random change on."""
    bench.clear()
    order = Order(rng.randint(1, bench.changes), "limit", size=int(2 ** rng.uniform(0, 17)))
    result = bench.start(order=order)
    check_refusal(result, allowed=(0, 2))
    return (
        f"no file of {order.size:,} bytes from change {order.at}, exit code {result.code}; removed {bench.converge()}"
    )


def small_disk(bench: Bench, rng: random.Random) -> str:
    """A file system that is too small, and is then made larger."""
    bench.clear()
    needed = sum(path.stat().st_size for path in _files(bench.whole))
    size = int(rng.uniform(0.02, 1.3) * needed)
    bench.run.mkdir()
    _mount(f"size={size}", bench.run)
    try:
        result = bench.start()
        check_refusal(result, allowed=(0, 2))
        _mount("remount,size=1g", bench.run)
        return f"a disk of {size:,} bytes, exit code {result.code}; removed {bench.converge()}"
    finally:
        subprocess.run(["umount", "--lazy", str(bench.run)], check=True)


def _kills(bench: Bench, rng: random.Random, at_most: int = 3) -> str:
    said = []
    for _ in range(rng.choice(range(1, at_most + 1))):
        order = Order(
            at=rng.randint(1, bench.changes),
            whom=rng.choice(("launcher", "launcher", "self", "all")),
            signal=rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)),
            after=rng.choice((0.0, 0.0, rng.uniform(0, 5), rng.uniform(0, 200))),
        )
        result = bench.start(order=order)
        # A stage's process that is killed by another is a crash of it (1), or it ends as it was asked to.
        allowed = _ENDS[signal.Signals(order.signal)] + (() if order.whom == "launcher" else (1, 2))
        check_refusal(result, allowed=allowed)
        name = signal.Signals(order.signal).name
        said.append(f"{name} to {order.whom} at change {order.at} + {order.after:.0f} ms: {result.code}")
    return ", ".join(said)


def damage(run: Path, rng: random.Random) -> str:
    """Damage a random file of a run; returns what was done."""
    file = rng.choice(_files(run))
    name = file.relative_to(run)
    size = file.stat().st_size
    what = rng.choice(("flip", "flip", "flip", "cut", "empty", "remove", "zeros", "longer"))
    if what == "remove" or not size:
        file.unlink()
        return f"{name} removed"
    content = bytearray(file.read_bytes())
    place = rng.randrange(size)
    if what == "flip":
        content[place] ^= 1 << rng.randrange(8)
    elif what == "cut":
        del content[place:]
    elif what == "empty":
        content.clear()
    elif what == "zeros":
        content[place : place + 512] = bytes(len(content[place : place + 512]))
    else:
        content += bytes(rng.randrange(256) for _ in range(rng.randint(1, 40)))
    file.write_bytes(content)
    return f"{name}: {what} at byte {place} of {size}"


def _files(run: Path) -> list[Path]:
    return sorted(path for path in run.rglob("*") if path.is_file() and not path.is_symlink())


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a file system, which takes root."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _mount("size=64k", folder)
    except (OSError, Fault):
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return True


def _mount(options: str, folder: Path) -> None:
    if shutil.which("mount") is None:
        raise Fault("no mount on this machine")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Fault(f"mount: {done.stderr.strip()}")


KINDS: dict[str, Callable[[Bench, random.Random], str]] = {
    "kill": kill,
    "kill-cold": kill_cold,
    "flip": flip,
    "flip-unfinished": flip_unfinished,
    "full": full,
    "limited": limited,
    "small-disk": small_disk,
    "machine": machine,
}
#: How often they are drawn.
WEIGHTS = {"kill": 4, "flip": 4, "flip-unfinished": 4}
