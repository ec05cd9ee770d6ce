"""Logging of a process: one handler, tagged with the rank where there are several."""

from __future__ import annotations

import logging
import os

from nemo_minitron.runtime.cpu.quiet import loud, quiet

__all__ = ["configure"]

#: Loggers that tell each start of a process at length; their warnings stay.
_TALKATIVE = (
    "datasets",
    "fiddle",
    "filelock",
    "fsspec",
    "lightning",
    "matplotlib",
    "megatron",
    "nemo_logger",
    "nemo_run",
    "numba",
    "torch.distributed",
    "torchx",
    "transformers",
    "urllib3",
)


def configure(verbose: bool = False) -> logging.Logger:
    """Send log records to stderr, those of this suite from INFO on and others' from WARNING on.

    Args:
        verbose: show all records from INFO on, also those that :mod:`nemo_minitron.runtime.cpu.quiet` would hide.

    Returns:
        The suite's logger, ``nemo_minitron``.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    tag = f"rank {rank} " if world != "1" else ""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format=f"%(asctime)s {tag}%(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.WARNING)
    if verbose:
        loud()
    else:
        quiet()
    suite = logging.getLogger("nemo_minitron")
    suite.setLevel(logging.INFO)
    return suite
