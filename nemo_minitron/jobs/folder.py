"""The folder beside a stage's output in which its job works: logs, settings, and what the job began to make."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.config import StageConfig
from nemo_minitron.jobs.records import identity_of
from nemo_minitron.runtime.files import replace_file

__all__ = ["begin", "begun", "job_folder_of", "write_settings"]

_BEGUN = "begun.json"


def job_folder_of(config: StageConfig) -> Path:
    """Where a stage's logs lie: ``logs/<output's name>`` beside its output, which itself is only renamed into place."""
    output = Path(config.output).absolute()
    return output.parent / "logs" / output.name


def write_settings(config: StageConfig, folder: Path) -> None:
    """Write the ``config.yaml`` that the ranks of a job read."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
    replace_file(folder / "config.yaml", settings)


def begin(config: StageConfig) -> None:
    """Note beside a stage's logs what it is about to make; the record says so only at the end."""
    folder = job_folder_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / _BEGUN, json.dumps(identity_of(config), default=str) + "\n")


def begun(config: StageConfig) -> dict[str, Any] | None:
    """What was begun last at a stage's output, as :func:`~nemo_minitron.jobs.records.identity_of`; None if unknown."""
    try:
        found = json.loads((job_folder_of(config) / _BEGUN).read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return found if isinstance(found, dict) and {"stage", "hash", "settings", "parents"} <= found.keys() else None
