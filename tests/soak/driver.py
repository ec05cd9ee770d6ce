"""Draw faults until the time is over, and count what they did."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from soak.bench import Bench, Fault
from soak.kinds import KINDS, WEIGHTS, can_mount
from soak.program import programs
from soak.workload import FULL

__all__ = ["case", "seed_of", "soak"]


def seed_of(given: str | None) -> str:
    """The seed of a soak test: as given, or else ``MINITRON_SOAK_SEED``, or else drawn."""
    return given or os.environ.get("MINITRON_SOAK_SEED") or secrets.token_hex(4)


def case(bench: Bench, seed: str, number: int, kinds: list[str]) -> tuple[str, str, bool]:
    """Run a case.

    Args:
        bench: where.
        seed, number: what it is drawn from.
        kinds: to draw from.

    Returns:
        Its kind, what happened, and whether it was as it must be.
    """
    rng = random.Random(f"{seed}/{number}")
    kind = rng.choices(kinds, [WEIGHTS.get(kind, 1) for kind in kinds])[0]
    try:
        return kind, KINDS[kind](bench, rng), True
    except Fault as fault:
        return kind, "\n".join([str(fault), *getattr(fault, "__notes__", ())]), False
    except Exception:
        return kind, traceback.format_exc(), False


def soak(
    minutes: float, seed: str | None, first: int, cases: int | None, kinds: list[str] | None, folder: Path | None
) -> int:
    """Run cases until the time is over; see :mod:`soak.__main__` for the arguments.

    Returns:
        1 if there was a fault, else 0.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    seed = seed_of(seed)
    home = (folder or Path(tempfile.mkdtemp(prefix="minitron-soak-"))).absolute()
    home.mkdir(parents=True, exist_ok=True)
    chosen = kinds or [kind for kind in KINDS if kind != "small-disk" or can_mount(home / "disk")]
    print(f"seed {seed}, in {home}, kinds: {', '.join(chosen)}", flush=True)
    done: Counter[str] = Counter()
    faults: list[str] = []
    deadline = time.monotonic() + 60 * minutes
    with programs(home / "program") as program:
        bench = Bench(home, program, FULL)
        print(f"the undisturbed run makes {bench.changes} changes to its directory", flush=True)
        number = first
        while time.monotonic() < deadline and (cases is None or number < first + cases):
            kind, said, well = case(bench, seed, number, chosen)
            done[kind] += 1
            print(f"{number} {kind}: {'' if well else 'FAULT '}{said}", flush=True)
            if not well:
                faults.append(f"--seed {seed} --first {number} --cases 1 ({kind}): {said.splitlines()[0][:300]}")
                (home / "faults").mkdir(exist_ok=True)
                (home / "faults" / f"{number}.txt").write_text(said)
                left = home / "machine" / "run" if kind == "machine" else bench.run
                if left.exists():
                    shutil.copytree(left, home / "faults" / str(number), symlinks=True, dirs_exist_ok=True)
            number += 1
    print(f"seed {seed}: " + ", ".join(f"{count} {kind}" for kind, count in sorted(done.items())))
    print("\n".join([f"{len(faults)} faults", *faults]) if faults else "nothing lost, nothing false")
    if not faults and folder is None:
        shutil.rmtree(home, ignore_errors=True)
    return 1 if faults else 0
