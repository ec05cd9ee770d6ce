"""What a file or word in the place of a configuration is, where it is not the one that the command takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.config.slurm import SlurmConfig
from nemo_minitron.config.spelling import nearest, stages_with
from nemo_minitron.config.stages import STAGES, PipelineConfig

__all__ = ["no_configuration", "other_kind"]

#: Settings that a file must hold beyond what the command takes, to be one of another kind.
_FOREIGN = 2


def no_configuration(name: str, wanted: type[Any] | None, shipped: Sequence[str]) -> str:
    """Why ``name`` names no configuration, and what to give instead.

    Args:
        name: path or word in the place of the configuration.
        wanted: class that was to be read; None for any.
        shipped: names of the shipped configurations.
    """
    path, stage = Path(name), str(getattr(wanted, "STAGE", ""))
    if wanted is PipelineConfig:
        shipped = [known for known in shipped if known not in STAGES]
    known = f"shipped configurations: {', '.join(shipped)}"
    if stage:
        known = f"the shipped one is {stage}" if stage in shipped else f"`minitron config {stage}` prints one"
    if "=" in name:
        command = f"minitron {stage or 'run'} {stage if stage in shipped else 'FILE'} {name}"
        return f"is a setting, where the configuration belongs; give that first: {command}"
    what = "is a directory" if path.is_dir() else "is no YAML file" if path.is_file() else "no such file"
    near = "" if path.exists() else nearest(path.name.removesuffix(".yaml"), shipped)
    meant = _as_setting(name, wanted)
    if near or path.suffix in (".yaml", ".yml") or not meant:
        return f"{what}{near or '; give a YAML file'}; {known}"
    example = stage if stage in shipped else "FILE"
    return (
        f"{what}; give a YAML file, or the name of a shipped one. To use it as a setting: "
        f"minitron {stage} {example} {meant}"
    )


def other_kind(keys: Collection[str], wanted: type[Any], path: str) -> str | None:
    """The remedy for a file with these settings that is of another kind as a whole; None where it is not.

    Args:
        keys: settings that the file holds.
        wanted: class that is to be read from it: of a stage, of a pipeline or of Slurm.
        path: of the file, as it was given.
    """
    foreign = set(keys) - {field.name for field in dataclasses.fields(wanted)}
    if wanted is not PipelineConfig and "stages" in foreign:
        return f"is a pipeline; run it with: minitron run {path}"
    if wanted is PipelineConfig and "stages" in keys:
        return None
    if len(foreign) < _FOREIGN:
        return None
    if wanted is not SlurmConfig and set(keys) <= {field.name for field in dataclasses.fields(SlurmConfig)}:
        return f"has the settings of a Slurm cluster; give it to a pipeline: minitron run PIPELINE --slurm {path}"
    kinds = stages_with(keys)
    if Path(path).stem in kinds:
        kinds = [Path(path).stem]
    if not kinds:
        return None
    command = f"minitron {kinds[0]} {path}"
    if len(kinds) > 1:
        return f"is a configuration of {', '.join(kinds[:-1])} or {kinds[-1]}, such as: {command}"
    return f"is a configuration of {kinds[0]}; run it with: {command}"


def _as_setting(name: str, wanted: type[Any] | None) -> str:
    """``model=name``, by what the stage reads first; empty where it reads nothing."""
    inputs = getattr(wanted, "INPUTS", ())
    if not inputs:
        return ""
    setting = "models.NAME" if inputs[0] == "models" else inputs[0]
    return f"{setting}={name}"
