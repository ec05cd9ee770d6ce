"""The largest memory that a process has used."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

__all__ = ["peak_gpu_bytes", "peak_rss_bytes"]


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


def peak_gpu_bytes() -> int:
    """The most that the tensors of this process took of its GPU, in bytes; 0 if it used none.

    Torch is not imported: a process that has not imported it used no GPU.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return max(1, torch.cuda.max_memory_allocated())  # a process has one device, torch's current one
