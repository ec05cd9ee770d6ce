"""What rank 0 of a job tells the others before they have a process group."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

__all__ = ["from_first_rank"]

#: Of this process; every rank of a job makes the same calls.
_CALLS = itertools.count()
#: The store must last until the ranks have made their process group, which meets there too.
_stores: list[Any] = []


def from_first_rank(make: Callable[[], str]) -> str:
    """A text that rank 0 makes, on every rank. Every rank calls it; a process alone makes it itself.

    The ranks meet at the address that their launcher put into the environment. The process group can meet there later.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return make()
    from torch.distributed import rendezvous

    store, *_ = next(rendezvous("env://"))
    _stores.append(store)
    key = f"minitron/first-rank-{next(_CALLS)}"
    if os.environ["RANK"] == "0":
        store.set(key, make())
    return str(store.get(key).decode())
