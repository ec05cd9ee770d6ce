"""Stop a process of the suite right before one of its changes to a directory, or let the disk refuse from there on.

A warm server that imports this module has an audit hook in everything that it forks. The environment of a run says what
happens: ``MINITRON_SOAK`` is a JSON object with ``folder`` (whose changes count), ``counter`` (a file that has a byte
for each change so far, of all processes together), ``at`` (the change, from 1; 0 only counts), ``after`` (milliseconds
between that change and the fault), ``signal``, ``size``, and ``whom``: "launcher" (the process of the command), "self"
(the one that makes the change), "all", "disk" (from then on whatever opens a file for writing is told that the disk is
full), or "limit" (from then on no file grows beyond ``size`` bytes, whatever library writes it).
"""

from __future__ import annotations

import errno
import json
import os
import resource
import sys
import threading
import time
from typing import Any

__all__ = ["VARIABLE", "install"]

VARIABLE = "MINITRON_SOAK"

#: Events that change a directory, and which of their arguments are paths.
_CHANGES = {
    "open": (0,),
    "os.rename": (0, 1),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.mkdir": (0,),
    "os.link": (1,),
    "os.truncate": (0,),
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
#: Bytes that the command itself may always write: what it prints goes to a file here, and would be cut off too.
_PRINTED = 1 << 13
_busy = threading.local()


def _hook(event: str, args: tuple[Any, ...]) -> None:
    places = _CHANGES.get(event)
    if places is None or VARIABLE not in os.environ or getattr(_busy, "now", False):
        return
    if event == "open" and not (isinstance(args[2], int) and args[2] & _WRITES):
        return
    _busy.now = True
    try:
        plan = json.loads(os.environ[VARIABLE])
        if any(_is_below(args[place], plan["folder"]) for place in places):
            _count(plan, event)
    finally:
        _busy.now = False


def _is_below(path: Any, folder: str) -> bool:
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    return isinstance(path, str) and os.path.abspath(path).startswith(folder)  # noqa: PTH100  # resolve() opens links


def _count(plan: dict[str, Any], event: str) -> None:
    descriptor = os.open(plan["counter"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, b".")
        number = os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
    if not plan["at"] or number < plan["at"]:
        return
    if plan["whom"] == "disk":
        if event in ("open", "os.mkdir", "os.link"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif plan["whom"] == "limit":
        size = plan["size"] if "MINITRON_LAUNCHER" in os.environ else max(plan["size"], _PRINTED)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    elif number == plan["at"]:
        if plan["after"]:
            threading.Thread(target=_strike, args=(plan,), daemon=True).start()
        else:
            _strike(plan)


def _strike(plan: dict[str, Any]) -> None:
    time.sleep(plan["after"] / 1000)
    own, launcher = os.getpid(), int(os.environ.get("MINITRON_LAUNCHER", "0").split(":")[0]) or os.getpid()
    targets = {"self": [own], "launcher": [launcher], "all": [launcher, own]}[plan["whom"]]
    for pid in dict.fromkeys(targets):
        os.kill(pid, plan["signal"])


def install() -> None:
    """Hook into this process and all that are forked from it; it cannot be undone."""
    sys.addaudithook(_hook)


if os.environ.get("MINITRON_SOAK_SERVER"):
    install()
