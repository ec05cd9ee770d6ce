"""How much memory a process has had."""

from __future__ import annotations

import resource
from pathlib import Path

__all__ = ["peak_rss_bytes"]


def peak_rss_bytes() -> int:
    """Largest resident size of this process, in bytes.

    On Linux the high-water mark of its own address space (``VmHWM``): ``ru_maxrss`` also counts what the process that
    started it held when it did. Of a forked process it counts the pages that it shares with its parent, as it would
    count them had it imported the same itself.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
