"""The module of each stage, imported by name: nothing in this package imports a stage."""

from __future__ import annotations

import importlib
from types import ModuleType

from nemo_minitron.errors import MinitronError

__all__ = ["stage_module"]

#: Modules whose name would be a keyword.
_MODULES = {"import": "import_"}


def stage_module(stage: str) -> ModuleType:
    """The module of a stage, with its ``plan`` and ``run``.

    Raises:
        MinitronError: if this installation has no such stage.
    """
    name = f"nemo_minitron.stages.{_MODULES.get(stage, stage)}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise MinitronError(f"stage {stage}: is not part of this installation ({name} is missing)") from error
        raise
