"""Files in the directory of a run: ``pipeline.json`` lists its stages, ``slurm.json`` the jobs that run them.

Reports and ``minitron status`` read them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.config import PipelineConfig, StageConfig
from nemo_minitron.errors import ConfigError
from nemo_minitron.parsing import parse_json
from nemo_minitron.runtime.files import replace_file

__all__ = ["MANIFEST", "check_manifest", "is_manifest", "read_jobs", "read_manifest", "write_jobs", "write_manifest"]

MANIFEST = "pipeline.json"
_JOBS = "slurm.json"
_STAGE = {"name", "stage", "output"}
_REMEDY = "the command that made the run (minitron run ...) writes it anew and keeps what is done"
_FOREIGN = "choose another directory, or move the file away"


def write_manifest(folder: Path, pipeline: PipelineConfig, stages: Sequence[StageConfig]) -> None:
    """``pipeline.json``: the stages in order, where each writes, and their configurations."""
    manifest = {
        "name": pipeline.name,
        "stages": [{"name": s.name, "stage": s.STAGE, "output": s.output} for s in stages],
        "configs": {s.name: dataclasses.asdict(s) for s in stages},
    }
    replace_file(folder / MANIFEST, json.dumps(manifest, indent=2, default=str) + "\n")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The content of ``pipeline.json``; None where there is none.

    Raises:
        ConfigError: if it is cut off, or another program's.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); {_REMEDY}") from None
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"{path}: is damaged or cut off ({error}); {_REMEDY}") from None
    if not is_manifest(content):
        raise ConfigError(f"{path}: is not the pipeline.json of a run of this suite; {_FOREIGN}")
    return dict(content)


def check_manifest(folder: Path) -> str | None:
    """What is wrong with a ``pipeline.json`` that a run may replace; None where nothing is.

    Raises:
        ConfigError: if the file is another program's.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        return f"{path}: is damaged or cut off ({error})"
    if not is_manifest(content):
        raise ConfigError(f"{path}: is not the pipeline.json of a run of this suite; {_FOREIGN}")
    return None


def write_jobs(folder: Path, jobs: Mapping[str, str]) -> None:
    """``slurm.json``: the Slurm job of each stage, the one that was submitted last."""
    replace_file(folder / _JOBS, json.dumps({**read_jobs(folder), **jobs}, indent=2) + "\n")


def read_jobs(folder: Path) -> dict[str, str]:
    """The Slurm job of each stage that was submitted; empty where none was, or the file is damaged."""
    try:
        content = parse_json((folder / _JOBS).read_bytes())
    except (OSError, ValueError):
        return {}
    return {str(name): str(job) for name, job in content.items()} if isinstance(content, dict) else {}


def is_manifest(content: Any) -> bool:
    """Whether the content of a file is what :func:`write_manifest` writes."""
    stages = content.get("stages") if isinstance(content, dict) else None
    return (
        isinstance(stages, list)
        and isinstance(content.get("name"), str)
        and all(
            isinstance(stage, dict) and stage.keys() >= _STAGE and all(isinstance(stage[key], str) for key in _STAGE)
            for stage in stages
        )
    )
