"""The shell's completion: names of configurations, and the settings that may follow them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.config.describe import CLUSTER, CONFIGURATIONS, plain, settings_of
from nemo_minitron.config.load import find_config, shipped_configs, shipped_slurm
from nemo_minitron.config.stages import STAGES
from nemo_minitron.errors import ConfigError
from nemo_minitron.parsing import parse_yaml

__all__ = ["complete_config", "complete_name", "complete_override", "complete_slurm"]


def complete_name(incomplete: str) -> list[str]:
    """The names that ``minitron config`` takes."""
    return [name for name in CONFIGURATIONS if name.startswith(incomplete)]


def complete_config(incomplete: str) -> list[str]:
    """Shipped configurations, YAML files, and the folders that may hold some."""
    return [*_files(incomplete), *(name for name in shipped_configs() if name.startswith(incomplete))]


def complete_slurm(incomplete: str) -> list[str]:
    """Shipped Slurm settings, YAML files, and folders."""
    return [*_files(incomplete), *(name for name in shipped_slurm() if name.startswith(incomplete))]


def complete_override(
    command: str, incomplete: str, given: Iterable[str] = (), config: str | None = None
) -> list[tuple[str, str]]:
    """``key=``, with its meaning, of each setting of a command that is not given yet.

    Args:
        command: of ``minitron``.
        incomplete: the beginning of the word.
        given: the overrides before it.
        config: of ``minitron run``, the pipeline: the settings of its stages follow, ``stages.<name>.<key>=``.
    """
    prefixes: list[tuple[str, type[Any]]]
    if command == "plan":
        prefixes = [("cluster.", CLUSTER)]
    elif command == "run":
        prefixes = [("", CONFIGURATIONS["pipeline"])]
        if config is not None and incomplete.startswith("stages."):
            prefixes += [(f"stages.{name}.", CONFIGURATIONS[kind]) for name, kind in _stages(config)]
    else:
        prefixes = [("", CONFIGURATIONS[command])]
    taken = {word.partition("=")[0] for word in given}
    return [
        (f"{setting.name}=", plain(setting.text))
        for prefix, cls in prefixes
        if prefix.startswith(incomplete) or incomplete.startswith(prefix)
        for setting in settings_of(cls, prefix=prefix)
        if not setting.is_group
        and "[]" not in setting.name
        and setting.name.startswith(incomplete)
        and setting.name not in taken
    ]


def _stages(config: str) -> Iterator[tuple[str, str]]:
    """Name and kind of each stage of a pipeline, as far as the file can be read."""
    try:
        values = parse_yaml(find_config(config).read_bytes())
    except (ConfigError, OSError, ValueError, yaml.YAMLError):
        return
    stages = values.get("stages") if isinstance(values, dict) else None
    for entry in stages if isinstance(stages, list) else ():
        kind = entry.get("stage") if isinstance(entry, dict) else None
        if isinstance(kind, str) and kind in STAGES:
            yield str(entry.get("name", kind)), kind


def _files(incomplete: str) -> Iterator[str]:
    folder, slash, start = incomplete.rpartition("/")
    try:
        entries = sorted(Path(f"{folder}{slash}" or ".").iterdir())
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith(start) and (start or not entry.name.startswith(".")):
            if entry.is_dir():
                yield f"{folder}{slash}{entry.name}/"
            elif entry.suffix in (".yaml", ".yml"):
                yield f"{folder}{slash}{entry.name}"
