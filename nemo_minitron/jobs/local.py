"""Run one stage from its configuration: check the output, start the processes, write the record."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Sequence
from typing import Any

from nemo_minitron.config import StageConfig
from nemo_minitron.jobs.folder import begin, job_folder_of, write_settings
from nemo_minitron.jobs.launch import RankResult, Starter, launch
from nemo_minitron.jobs.modules import reference_of
from nemo_minitron.jobs.needs import check_needs
from nemo_minitron.jobs.outputs import check_output, set_aside
from nemo_minitron.jobs.ranks import forked
from nemo_minitron.jobs.records import write_record
from nemo_minitron.jobs.reuse import check_goes_on
from nemo_minitron.jobs.warm import warm_pool

__all__ = ["record_job", "run_stage", "starter_of"]


def starter_of(config: StageConfig) -> Starter | None:
    """What :func:`~nemo_minitron.jobs.launch.launch` may start a stage's processes by; None where that is CUDA."""
    return None if config.runtime.device == "cuda" else forked(config.LEVEL)


def run_stage(config: StageConfig, on_output: Callable[[bytes], None] | None = None) -> dict[str, Any]:
    """Run a stage in processes of its own and record what it did.

    On the CPU they are forked from the open :func:`~nemo_minitron.jobs.warm.warm_pool`; several processes open one for
    themselves.

    Args:
        config: complete and without faults.
        on_output: called with what rank 0 prints.

    Returns:
        The record (:func:`~nemo_minitron.jobs.records.write_record`).

    Raises:
        MinitronError: what the stage refused.
        StageCrashError: what it failed by.
    """
    # A stage that resumes keeps its output; another that finds one is refused before anything starts.
    if not getattr(config, "resume", False):
        check_output(config.output, config.overwrite)
    check_goes_on(config)
    check_needs([config])
    folder = job_folder_of(config)
    write_settings(config, folder)
    started, clock = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), time.monotonic()
    starter = starter_of(config)
    pool = warm_pool(config.runtime.device) if config.processes > 1 and starter else contextlib.nullcontext()
    with set_aside(config), pool:
        begin(config)
        results = launch(
            "nemo_minitron.jobs.worker",
            [reference_of(config)],
            world_size=config.processes,
            folder=folder,
            threads=config.runtime.threads,
            timeout_minutes=config.runtime.timeout_minutes,
            on_output=on_output,
            starter=starter,
        )
        return record_job(config, results, started=started, seconds=time.monotonic() - clock)


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
        config,
        metrics=results[0].metrics,
        seconds=seconds,
        peak_rss_bytes=max(result.peak_rss_bytes for result in results),
        started=started,
    )
