"""The bandwidth of all-reduces, and that every rank takes part."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from nemo_minitron.doctor.checks import Context

__all__ = ["reference", "run"]

SIZES = {"cpu": (2**16, 2**20, 2**24), "cuda": (2**16, 2**20, 2**24, 2**28)}
REPEATS = {"cpu": 3, "cuda": 10}


def run(context: Context) -> dict[str, torch.Tensor]:
    """``sum``: smallest and largest element of the sums, which must be 1. The bandwidths go to the details.

    Bus bandwidth is defined as in NVIDIA's nccl-tests: ``bytes / time * 2 (n - 1) / n``. It can be compared with the
    bandwidth of the links, whatever the number of ranks.
    """
    groups = context.groups()
    device = groups.device.torch
    rows: list[dict[str, Any]] = []
    extremes = [1.0, 1.0]
    layout = context.layout
    measured = [("world", dist.group.WORLD, layout.world_size)]
    measured += [
        (name, group, size)
        for name, group, size in (
            ("tensor", groups.tp, layout.tensor),
            ("data", groups.dp, layout.data),
        )
        if 1 < size < layout.world_size
    ]
    for name, group, size in measured:
        if size == 1:
            continue
        for count in SIZES[device.type]:
            seconds, low, high = _all_reduce(group, count, context.dtype, device)
            extremes = [min(extremes[0], low), max(extremes[1], high)]
            rows.append(
                {
                    "group": name,
                    "ranks": size,
                    "bytes": count,
                    "seconds": seconds,
                    "bus_gb_per_s": count / seconds * 2 * (size - 1) / size / 1e9,
                }
            )
    context.details["bandwidth"] = rows
    # Of all ranks: what one of them lacks is not seen by the others.
    worst = torch.tensor([-extremes[0], extremes[1]], dtype=torch.float64)
    everyone: list[Any] = [None] * layout.world_size
    dist.all_gather_object(everyone, worst.tolist())
    if not groups.is_main:
        return {}
    return {"sum": torch.tensor([min(-times[0] for times in everyone), max(times[1] for times in everyone)])}


def reference(context: Context) -> dict[str, torch.Tensor]:
    """Each element is one on one rank and zero on the others."""
    return {"sum": torch.ones(2)}


def _all_reduce(group: Any, count: int, dtype: torch.dtype, device: torch.device) -> tuple[float, float, float]:
    """Median seconds of an all-reduce of ``count`` bytes, and the smallest and largest element of its result."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    elements = count // dtype.itemsize
    mine = (torch.arange(elements, device=device) % size == rank).to(dtype)
    times = []
    total = mine
    for _ in range(1 + REPEATS[device.type]):  # the first one makes connections
        total = mine.clone()
        dist.barrier(group=group)
        _synchronize(device)
        started = time.perf_counter()
        dist.all_reduce(total, group=group)
        _synchronize(device)
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[len(times[1:]) // 2], float(total.min()), float(total.max())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
