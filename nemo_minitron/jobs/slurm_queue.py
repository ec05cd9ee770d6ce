"""The jobs of a run that are in Slurm's queue: which of them a new submission keeps, and their end by the user."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from nemo_minitron.config import StageConfig
from nemo_minitron.errors import ConfigError, MinitronError
from nemo_minitron.jobs.manifest import read_jobs, read_manifest
from nemo_minitron.jobs.output import settings_text
from nemo_minitron.jobs.slurm_status import job_states
from nemo_minitron.parsing import parse_yaml

__all__ = ["cancel_jobs", "live_jobs"]


class Submitted(Protocol):
    """A job of a run (:class:`~nemo_minitron.jobs.slurm_submit.Job`)."""

    @property
    def config(self) -> StageConfig: ...

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> Path: ...

    @property
    def settings_file(self) -> str: ...


def live_jobs(run: Path, jobs: Sequence[Submitted]) -> dict[str, str]:
    """Of these jobs the numbers of those that were submitted before and wait or run, by name.

    Raises:
        ConfigError: if one of them was submitted with other settings.
    """
    recorded = read_jobs(run)
    states = job_states(recorded[job.name] for job in jobs if job.name in recorded)
    live, faults = {}, []
    for job in jobs:
        number = recorded.get(job.name, "")
        if number not in states or not states[number].is_live:
            continue
        live[job.name] = number
        if _settings(job.folder / job.settings_file) != _comparable(parse_yaml(settings_text(job.config))):
            faults.append(
                f"{job.name}: job {number} is in the queue with other settings; wait for its end, or cancel it "
                f"(minitron cancel {run})"
            )
    if faults:
        raise ConfigError(faults)
    return live


def cancel_jobs(run: Path, stages: Sequence[str] = ()) -> dict[str, str]:
    """Cancel the jobs of a run that wait or run.

    Args:
        run: its directory.
        stages: of these stages, or single jobs by name; none for all.

    Returns:
        The numbers of the cancelled jobs, by name.

    Raises:
        ConfigError: if there is no such run, stage or job.
        MinitronError: if Slurm's command is not here, or refuses.
    """
    manifest, recorded = read_manifest(run) if run.is_dir() else None, read_jobs(run)
    if manifest is None or not recorded:
        raise ConfigError(f"{run}: holds no run whose jobs were submitted; give the output of `minitron run --slurm`")
    named = {stage["name"] for stage in manifest["stages"]}
    if unknown := [stage for stage in stages if stage not in recorded and stage not in named]:
        raise ConfigError([f"{name}: is no stage or job of {run}; jobs: {', '.join(recorded)}" for name in unknown])
    wanted = {
        name: number
        for name, number in recorded.items()
        if not stages or any(name == stage or name.startswith(f"{stage}.") for stage in stages)
    }
    program = shutil.which("scancel")
    if program is None:
        raise MinitronError(
            f"scancel is not here; on a node of the cluster's: scancel {' '.join(dict.fromkeys(wanted.values()))}"
        )
    states = job_states(wanted.values())
    live = {name: number for name, number in wanted.items() if number in states and states[number].is_live}
    if live:
        done = subprocess.run([program, *live.values()], capture_output=True, text=True, check=False)
        if done.returncode:
            raise MinitronError(f"scancel {' '.join(live.values())}: {done.stderr.strip() or done.returncode}")
    return live


def _settings(path: Path) -> Any:
    """The settings that a job was submitted with; None where they cannot be read."""
    try:
        return _comparable(parse_yaml(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _comparable(settings: Any) -> Any:
    """Settings without those that a job changes itself when it begins."""
    return {key: value for key, value in settings.items() if key != "overwrite"} if isinstance(settings, dict) else None
