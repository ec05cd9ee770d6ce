"""The time limit of collectives, ``runtime.collective_timeout_minutes``, in process groups that a library makes.

:func:`~nemo_minitron.runtime.groups.initialize` gives its groups a time limit itself. NeMo's strategies, which make
the groups of trainings, take no limit, and Megatron's default is half an hour: all ranks would wait that long for a
node that hangs.
"""

from __future__ import annotations

import datetime
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["bounded_groups", "limit_waits"]

#: A group with such a limit is meant to wait for ever.
_FOR_EVER = datetime.timedelta(days=1)
_minutes: float | None = None


def limit_waits(minutes: float | None) -> None:
    """Set the time limit of this process, once, at its start; None leaves each group the limit that it is made with."""
    global _minutes
    _minutes = minutes


@contextmanager
def bounded_groups() -> Iterator[None]:
    """A context in which every process group is made with the limit of this process.

    Setting it later has no effect on gloo: its sends and receives keep the limit that their group was made with.
    """
    if _minutes is None:
        yield
        return
    import torch.distributed as dist

    limit = datetime.timedelta(minutes=_minutes)
    before = {name: getattr(dist, name) for name in ("init_process_group", "new_group")}
    for name, make in before.items():
        setattr(dist, name, _bounded(make, limit))
    try:
        yield
    finally:
        for name, make in before.items():
            setattr(dist, name, make)


def _bounded(make: Callable[..., Any], limit: datetime.timedelta) -> Callable[..., Any]:
    signature = inspect.signature(make)

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        given = call.arguments.get("timeout")
        if given is None or given < _FOR_EVER:
            call.arguments["timeout"] = limit
        return make(*call.args, **call.kwargs)

    return made
