"""Stages of other packages: entry points of the group ``nemo_minitron.stages``, each the class of a configuration."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import entry_points

__all__ = ["GROUP", "import_plugins"]

GROUP = "nemo_minitron.stages"

logger = logging.getLogger(__name__)


def import_plugins() -> None:
    """Import the classes of the installed entry points, which register themselves in the table of stages.

    If one cannot be imported, a warning names it, and the command goes on without it.
    """
    for entry in entry_points(group=GROUP):
        if entry.module in sys.modules:
            continue  # imported already, or about to be: it may be what imports this package
        try:
            entry.load()
        except Exception as error:  # of whatever kind: other stages do not depend on it
            logger.warning("stage %s of %s is left out: %s: %s", entry.name, entry.value, type(error).__name__, error)
