"""Run one stage from its configuration: check the output, start the processes, write the record."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.config import StageConfig
from nemo_minitron.runtime.files import replace_file
from nemo_minitron.runtime.launch import RankResult, launch
from nemo_minitron.stages.base import check_output, config_hash, set_aside, write_record

__all__ = ["begin", "begun", "job_folder_of", "record_job", "run_stage", "write_settings"]


def job_folder_of(config: StageConfig) -> Path:
    """Where a stage's logs lie: ``logs/<output's name>`` beside its output, which itself is only renamed into place."""
    output = Path(config.output).absolute()
    return output.parent / "logs" / output.name


def begin(config: StageConfig) -> None:
    """Note beside a stage's logs what it is about to make, by identity; the record says so only at the end."""
    folder = job_folder_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "begun", config_hash(config) + "\n")


def begun(config: StageConfig) -> str | None:
    """The identity of what was begun last at a stage's output; None where nothing is known."""
    path = job_folder_of(config) / "begun"
    return path.read_text().strip() if path.is_file() else None


def run_stage(config: StageConfig, on_output: Callable[[bytes], None] | None = None) -> dict[str, Any]:
    """Run a stage in processes of its own and record what it did.

    Args:
        config: complete and without faults.
        on_output: called with what rank 0 prints.

    Returns:
        The record (:func:`~nemo_minitron.stages.base.write_record`).

    Raises:
        MinitronError: what the stage refused.
        StageCrashError: what it failed by.
    """
    stage = config.STAGE
    # A stage that resumes keeps its output; another that finds one is refused before anything starts.
    if not getattr(config, "resume", False):
        check_output(config.output, config.overwrite)
    folder = job_folder_of(config)
    write_settings(config, folder)
    started, clock = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), time.monotonic()
    with set_aside(config):
        begin(config)
        results = launch(
            "nemo_minitron.stages.worker",
            [stage],
            world_size=config.processes,
            folder=folder,
            threads=config.runtime.threads,
            timeout_minutes=config.runtime.timeout_minutes,
            on_output=on_output,
        )
        return record_job(config, results, started=started, seconds=time.monotonic() - clock)


def write_settings(config: StageConfig, folder: Path) -> None:
    """Write the ``config.yaml`` that the ranks of a job read."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
    replace_file(folder / "config.yaml", settings)


def record_job(config: StageConfig, results: Sequence[RankResult], *, started: str, seconds: float) -> dict[str, Any]:
    """Write the record of a stage whose ranks have all ended well.

    Args:
        config: of the stage.
        results: of its ranks.
        started: ISO time.
        seconds: wall time.
    """
    return write_record(
        config.output,
        config.STAGE,
        config,
        metrics=results[0].metrics,
        seconds=seconds,
        peak_rss_bytes=max(result.peak_rss_bytes for result in results),
        started=started,
    )
