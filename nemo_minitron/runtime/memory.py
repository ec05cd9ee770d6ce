"""The memory of a process and of its machine."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import psutil

__all__ = ["LIVE_SHARE", "host_memory", "peak_gpu_bytes", "peak_rss_bytes"]

#: Part of the free memory that the weights of a live model may take; activations and libraries have the other.
LIVE_SHARE = 0.8


def peak_rss_bytes() -> int:
    """Largest resident size of this process, in bytes.

    On Linux this is ``VmHWM``, the high-water mark of the process's own address space; ``ru_maxrss`` would include the
    size of the process that started it. Pages that a forked process shares with its parent are counted.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def host_memory() -> tuple[int, int]:
    """Total and free bytes; a container may have less than its machine."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            allowed = int(Path(limit).read_text())
            if allowed < total:
                total, free = allowed, min(free, allowed - int(Path(used).read_text()))
    return total, max(0, free)


def peak_gpu_bytes() -> int:
    """The most that the tensors of this process took of its GPU, in bytes; 0 if it used none.

    Torch is not imported: a process that has not imported it used no GPU.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return max(1, torch.cuda.max_memory_allocated())  # a process has one device, torch's current one
