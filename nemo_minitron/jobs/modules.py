"""The module of each stage, imported by name: nothing in this package imports a stage."""

from __future__ import annotations

import importlib
from types import ModuleType

from nemo_minitron.config import STAGES, StageConfig
from nemo_minitron.errors import MinitronError

__all__ = ["reference_of", "stage_module"]


def reference_of(config: StageConfig) -> str:
    """A name by which another process finds the stage of a configuration; see :func:`~nemo_minitron.config.find_stage`.

    Raises:
        MinitronError: for a class that the running script defines, since no other process can import it.
    """
    module = type(config).__module__
    if module == "__main__":
        raise MinitronError(
            f"stage {config.STAGE}: its configuration is defined in the script that runs, which the stage's processes "
            "cannot import; put it into a module of its own"
        )
    return config.STAGE if module.startswith("nemo_minitron.") else f"{module}:{config.STAGE}"


def stage_module(stage: str) -> ModuleType:
    """The module of a stage, with its ``plan`` and ``run``.

    Args:
        stage: its name, or what :func:`reference_of` gives; or the name of a module below ``nemo_minitron.stages`` that
            runs a part of a stage.

    Raises:
        MinitronError: if this installation has no such stage.
    """
    stage = stage.rpartition(":")[2]
    config = STAGES.get(stage, StageConfig)
    name = config.MODULE or f"nemo_minitron.stages.{stage}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise MinitronError(f"stage {stage}: is not part of this installation ({name} is missing)") from error
        raise
