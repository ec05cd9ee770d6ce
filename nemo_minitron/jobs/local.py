"""Run one stage from its configuration: check the output, start the processes, write the record."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Sequence
from typing import Any

from nemo_minitron.config import StageConfig
from nemo_minitron.jobs.atomic import check_output
from nemo_minitron.jobs.dry_run import check_stage_space, work_of
from nemo_minitron.jobs.failures import noting_failure
from nemo_minitron.jobs.launch import Starter, launch
from nemo_minitron.jobs.modules import reference_of
from nemo_minitron.jobs.needs import check_needs
from nemo_minitron.jobs.output import Output
from nemo_minitron.jobs.ranks import forked
from nemo_minitron.jobs.results import RankResult
from nemo_minitron.jobs.warm import warm_pool

__all__ = ["record_job", "run_output", "run_stage", "starter_of"]


def starter_of(config: StageConfig) -> Starter | None:
    """The ``starter`` of a stage's processes for :func:`~nemo_minitron.jobs.launch.launch`; None on CUDA."""
    return None if config.runtime.device == "cuda" else forked(config.LEVEL)


def run_stage(config: StageConfig, on_output: Callable[[bytes], None] | None = None) -> dict[str, Any]:
    """Run a stage in processes of its own and write its record; see :func:`run_output`."""
    return run_output(Output(config), on_output)


def run_output(output: Output, on_output: Callable[[bytes], None] | None = None) -> dict[str, Any]:
    """Make an output by running its stage in processes of its own, and write the record.

    On the CPU they are forked from the open :func:`~nemo_minitron.jobs.warm.warm_pool`; several processes open one for
    themselves.

    Args:
        output: of a configuration that is complete and without faults.
        on_output: called with what rank 0 prints.

    Returns:
        The record (:func:`~nemo_minitron.jobs.records.write_record`).

    Raises:
        MinitronError: if the stage refused its settings or inputs.
        StageCrashError: if it crashed.
    """
    with output.leased(), noting_failure(output.folder):
        return _run_leased(output, on_output)


def _run_leased(output: Output, on_output: Callable[[bytes], None] | None) -> dict[str, Any]:
    config = output.config
    # A stage that resumes keeps its output; another that finds one is refused before anything starts.
    if not output.resumable:
        check_output(config.output, config.overwrite)
    output.check_resumable()
    output.check_inputs()
    check_stage_space(output)
    check_needs([config])
    output.write_settings()
    started, clock = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), time.monotonic()
    starter = starter_of(config)
    pool = warm_pool(config.runtime.device) if config.processes > 1 and starter else contextlib.nullcontext()
    with output.replacing(), pool:
        output.begin()
        results = launch(
            "nemo_minitron.jobs.worker",
            [reference_of(config)],
            world_size=config.processes,
            folder=output.folder,
            threads=config.runtime.threads,
            timeout_minutes=config.runtime.timeout_minutes,
            on_output=on_output,
            starter=starter,
        )
        return record_job(output, results, started=started, seconds=time.monotonic() - clock)


def record_job(output: Output, results: Sequence[RankResult], *, started: str, seconds: float) -> dict[str, Any]:
    """Write the record of an output whose ranks have all ended well.

    Args:
        output: of the stage.
        results: of its ranks.
        started: ISO time.
        seconds: wall time.
    """
    return output.finish(
        results[0].metrics,
        seconds,
        peak_rss_bytes=max(result.peak_rss_bytes for result in results),
        peak_gpu_bytes=[result.peak_gpu_bytes for result in results],
        started=started,
        work=work_of(output.config),
    )
