"""How long a rank waits for the others: ``runtime.collective_timeout_minutes`` in process groups that others make.

:func:`~nemo_minitron.runtime.groups.initialize` gives its groups a time limit itself. NeMo's strategies, which make
those of the trainings, take none, and Megatron's default is half an hour: a node that hangs would hold all others for
that long.
"""

from __future__ import annotations

import datetime

__all__ = ["bound_groups", "limit_waits"]

_minutes: float | None = None


def limit_waits(minutes: float | None) -> None:
    """Set the limit for this process; None for whatever the groups were made with. Decided once, at process start."""
    global _minutes
    _minutes = minutes


def bound_groups() -> None:
    """Give every process group that is there the limit of this process. A collective that takes longer fails then."""
    if _minutes is None:
        return
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    limit = datetime.timedelta(minutes=_minutes)
    if not dist.is_initialized():
        return
    for group in list(distributed_c10d._world.pg_map):
        if dist.get_rank(group) >= 0:
            distributed_c10d._set_pg_timeout(limit, group)
