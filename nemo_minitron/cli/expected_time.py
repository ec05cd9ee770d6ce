"""How long a stage will take: by the record of an earlier run, or by its operations and a known speed.

Nothing is guessed: where neither is there, the time is unknown.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from nemo_minitron.config import ClusterConfig, StageConfig
from nemo_minitron.config.parts.checks import AUTO
from nemo_minitron.jobs.plans import StagePlan
from nemo_minitron.jobs.records import read_record
from nemo_minitron.planning import accelerator

__all__ = ["clock", "expected_time"]

UNKNOWN = "unknown"
#: Records that are read at most, the newest first.
_RECORDS = 200
#: Of the two amounts of work, how many times the other one may be, so that one time says something of the other.
_FAR = 50.0
_SIZE = 768
"""Rows of the matrices whose product is timed."""


def expected_time(config: StageConfig, plan: StagePlan) -> str:
    """The time that a stage is expected to take, and where the figure comes from."""
    text = _by_records(config, plan) or _by_operations(config, plan) or UNKNOWN
    limit = getattr(config, "max_minutes", None)
    return text if limit is None else f"{text}; trains at most {clock(60 * limit)} (max_minutes)"


def clock(seconds: float) -> str:
    """``75`` -> ``"1 min"``: two digits, for estimates."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{max(1.0, seconds):.0f} s"


def _by_records(config: StageConfig, plan: StagePlan) -> str | None:
    """By the run of such a stage with the nearest amount of work, on as many processes of the same kind."""
    key = "flops" if plan.flops else "bytes"
    work = plan.flops or sum(need.staying for need in plan.disk)
    if not work:
        return None
    best: tuple[float, float, Path, str] | None = None
    for path, record in _records(Path(config.output), config.STAGE):
        amount, seconds = float((record.get("work") or {}).get(key, 0.0)), _seconds(record)
        if not amount or not seconds or not _alike(config, record):
            continue
        far = max(work / amount, amount / work) * (1.0 if record.get("host") == socket.gethostname() else 2.0)
        if far <= _FAR and (best is None or far < best[0]):
            best = far, seconds * work / amount, path, str(record.get("host", ""))
    if best is None:
        return None
    _, seconds, path, host = best
    where = "this machine" if host == socket.gethostname() else host
    return f"about {clock(seconds)} (as {_short(path)} took on {where})"


def _seconds(record: dict[str, Any]) -> float:
    """The time of the whole work: a training that went on from an earlier state states its speed."""
    metrics = record["metrics"]
    speed, tokens = metrics.get("tokens_per_second"), metrics.get("tokens")
    if isinstance(speed, int | float) and isinstance(tokens, int) and speed > 0 and record["stage"] != "cache":
        return max(tokens / speed, float(record["seconds"]))
    return 0.0 if metrics.get("resumed") else float(record["seconds"])


def _alike(config: StageConfig, record: dict[str, Any]) -> bool:
    """Whether a record is of a run on as many processes of the same kind, in the same precision."""
    other = record["config"]
    layout = other.get("parallel") or {}
    world = 1
    for name in ("tensor", "pipeline", "data", "context"):
        world *= layout.get(name) or 1
    runtime = other.get("runtime", {})
    return (
        world == config.layout.world_size
        and runtime.get("device") == config.runtime.device
        and runtime.get("threads") == config.runtime.threads
        and getattr(config, "precision", None) in (AUTO, other.get("precision"))
    )


def _records(output: Path, stage: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Records of a kind of stage: at the output, beside it, and in the runs beside its own."""
    run = output.absolute().parent
    files = [*run.glob("*/record.json"), *run.parent.glob("*/*/record.json")]
    newest = sorted({file for file in files if file.is_file()}, key=lambda file: -file.stat().st_mtime)
    for file in newest[:_RECORDS]:
        record = read_record(file.parent)
        if record is not None and record["stage"] == stage:
            yield file.parent, record


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _by_operations(config: StageConfig, plan: StagePlan) -> str | None:
    """By the operations of the models. On the CPU that is a lower bound: all else comes on top."""
    if not plan.flops:
        return None
    name = _gpu() if config.runtime.device != "cpu" else None
    if name is not None:
        known = next((key for key in ("h100", "h200", "b200", "a100") if key in name.lower()), None)
        if known is None:
            return None
        cluster = ClusterConfig(gpu=known)
        seconds = plan.flops / (accelerator(cluster).flops * cluster.mfu * config.processes)
        gpus = f"{config.processes} x {known.upper()}"
        return f"about {clock(seconds)} (by its FLOPs on {gpus} at {100 * cluster.mfu:.0f} % of the peak)"
    if config.runtime.device == "cuda":
        return None
    speed = _matrix_product()
    return (
        f"at least {clock(plan.flops / speed)} (by its FLOPs at {speed / 1e9:.0f} GFLOP/s, "
        "the speed of a matrix product on this machine)"
    )


@cache
def _gpu() -> str | None:
    """The name of the first GPU; None without one."""
    program = shutil.which("nvidia-smi")
    if program is None or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    try:
        asked = subprocess.run(
            [program, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=1.5,
            check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(asked.stdout.splitlines()), None)


@cache
def _matrix_product() -> float:
    """Operations a second of a product of fp32 matrices, on all cores; the fastest of a few."""
    import numpy as np

    left = np.ones((_SIZE, _SIZE), dtype=np.float32)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        left @ left
        times.append(time.perf_counter() - started)
    return float(2 * _SIZE**3 / min(times))
