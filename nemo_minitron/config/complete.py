"""What the shell's completion offers: names of configurations, and the settings that may follow them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from nemo_minitron.config.describe import CLUSTER, CONFIGURATIONS, plain, settings_of
from nemo_minitron.config.load import shipped_configs, shipped_slurm

__all__ = ["complete_config", "complete_name", "complete_override", "complete_slurm"]


def complete_name(incomplete: str) -> list[str]:
    """What ``minitron config`` takes."""
    return [name for name in CONFIGURATIONS if name.startswith(incomplete)]


def complete_config(incomplete: str) -> list[str]:
    """Shipped configurations, YAML files, and the folders that may hold some."""
    return [*_files(incomplete), *(name for name in shipped_configs() if name.startswith(incomplete))]


def complete_slurm(incomplete: str) -> list[str]:
    """Shipped Slurm settings, YAML files, and folders."""
    return [*_files(incomplete), *(name for name in shipped_slurm() if name.startswith(incomplete))]


def complete_override(command: str, incomplete: str, given: Iterable[str] = ()) -> list[tuple[str, str]]:
    """``key=`` of each setting of a command that is not given yet, with its meaning."""
    name = {"run": "pipeline"}.get(command, command)
    prefix = "cluster." if name == "plan" else ""
    cls = CLUSTER if name == "plan" else CONFIGURATIONS[name]
    taken = {word.partition("=")[0] for word in given}
    return [
        (f"{setting.name}=", plain(setting.text))
        for setting in settings_of(cls, prefix=prefix)
        if not setting.is_group
        and "[]" not in setting.name
        and setting.name.startswith(incomplete)
        and setting.name not in taken
    ]


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
