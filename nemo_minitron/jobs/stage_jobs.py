"""The jobs of a stage that is several on a cluster (:meth:`~nemo_minitron.config.StageConfig.jobs`).

A stage that has more than one job names a module below ``nemo_minitron.stages`` (``JOBS``) with three functions:
``prepare`` says what a job runs, which may depend on what the jobs before it have found; ``finish`` follows it; and
``finished`` names the jobs that an earlier submission has done. Such a module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nemo_minitron.config import StageConfig
from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs.modules import stage_module
from nemo_minitron.jobs.output import Output

__all__ = ["STAGE_FILE", "JobsModule", "Prepared", "finished_jobs", "job_folder_of", "job_name", "jobs_module"]

STAGE_FILE = "stage.yaml"
"""In the folder of a job that is a part of a stage: the stage's configuration."""


@dataclass(frozen=True)
class Prepared:
    """What a job of a stage runs.

    Attributes:
        config: of its ranks: of another stage, whose output it makes, or of the stage itself.
        part: module below ``nemo_minitron.stages`` that runs in the place of the stage ``config`` is of; it makes no
            output with a record.
    """

    config: StageConfig
    part: str | None = None


class JobsModule(Protocol):
    """The module ``JOBS`` of a stage."""

    def prepare(self, config: StageConfig, name: str, folder: Path) -> Prepared | None:
        """What a job runs; None where there is nothing to do. Rank 0 calls it before the others start.

        Args:
            config: of the stage.
            name: of the job.
            folder: of the job, for files that the part reads beside ``config.yaml``.

        Raises:
            MinitronError: for inputs that cannot be used.
        """

    def finish(self, config: StageConfig, name: str, folder: Path) -> None:
        """Called by rank 0 when all ranks of a job have ended well."""

    def finished(self, config: StageConfig) -> set[str]:
        """The jobs that an earlier submission, whose output is unfinished, has done. Nothing is written."""


def jobs_module(config: StageConfig) -> JobsModule:
    """The module that prepares the jobs of a stage.

    Raises:
        MinitronError: if this installation has no such module.
    """
    module: JobsModule = stage_module(config.JOBS)  # type: ignore[assignment]
    return module


def job_name(stage: str, job: str) -> str:
    """The name of a job among all jobs of a run: that of the stage for the last of its jobs."""
    return f"{stage}.{job}" if job else stage


def job_folder_of(config: StageConfig, job: str) -> Path:
    """The folder of a job's configuration, logs and results: for the last job of a stage that of the stage."""
    folder = Output(config).folder
    return folder / "jobs" / job if job else folder


def finished_jobs(config: StageConfig) -> set[str]:
    """The jobs of a stage that need not run (again): none where the stage begins anew."""
    if not config.JOBS or config.overwrite or not getattr(config, "resume", True):
        return set()
    if Output(config).state()[0] not in ("unfinished", "new"):
        return set()
    try:
        return jobs_module(config).finished(Output(config).as_settled())
    except MinitronError:  # the jobs explain it
        return set()
