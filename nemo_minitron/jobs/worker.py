"""``python -m nemo_minitron.jobs.worker STAGE [PART]``: the program of each process of a stage, or of a part of it.

The launcher states the job's folder in the environment; its ``config.yaml`` is the resolved configuration.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from nemo_minitron.config import StageConfig, load
from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs.launch import attach, job_folder
from nemo_minitron.jobs.lease import release_all
from nemo_minitron.jobs.modules import stage_module
from nemo_minitron.jobs.needs import check_needs
from nemo_minitron.jobs.output import Output
from nemo_minitron.jobs.results import RankResult, failure, save_result
from nemo_minitron.jobs.skipped import run_module
from nemo_minitron.runtime import log
from nemo_minitron.runtime.disk import disk_fault
from nemo_minitron.runtime.environment import order_kernels, threads_each
from nemo_minitron.runtime.memory import peak_gpu_bytes, peak_rss_bytes
from nemo_minitron.runtime.waits import limit_waits

__all__ = ["main", "set_up"]


def set_up(config: StageConfig) -> None:
    """Set device, threads and seeds of this process, before the stage imports the stack.

    The seeds are the same on every rank; Megatron's own tracker sets seeds that must differ, when the groups are made.
    """
    order_kernels(config)
    limit_waits(config.runtime.collective_timeout_minutes)
    import numpy as np
    import torch

    from nemo_minitron.runtime import cpu

    torch.set_num_threads(_threads(config))
    cpu.prepare(config.runtime.device)
    random.seed(config.runtime.seed)
    np.random.seed(config.runtime.seed % 2**32)
    torch.manual_seed(config.runtime.seed)


def _threads(config: StageConfig) -> int:
    """What the configuration says, else the launcher's variable, else this machine's cores shared by its processes."""
    if config.runtime.threads is not None:
        return config.runtime.threads
    if (variable := os.environ.get("OMP_NUM_THREADS", "")).isdigit() and int(variable) > 0:
        return int(variable)
    return threads_each(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def execute(stage: str, folder: Path, part: str | None = None, *, rank: int = 0) -> dict[str, Any]:
    """Read the configuration, set up the process and run the stage, or the module ``part`` of it, as this rank."""
    config = load(stage, folder / "config.yaml")
    check_needs([config])  # here too: what started this process may have another environment
    module = stage_module(part or stage)
    set_up(config)
    return run_module(module, Output(config).settled(), rank=rank)


def main(stage: str, part: str | None = None, *, launched: bool = False) -> int:
    """Run one rank of a stage, or of the part of it that a module of its own runs on several ranks.

    Args:
        stage, part: as :func:`execute` takes them.
        launched: :func:`~nemo_minitron.jobs.launch.launch` started the process, reports its failure and adds it to its
            log: said here too, it would be on the terminal twice.

    Returns:
        0 done, the error's own code if refused (2; 75 if preempted), 1 crashed. The result file has details.
    """
    folder = job_folder()
    try:
        rank = attach(folder)
    except OSError as error:
        if (fault := disk_fault(error, folder)) is None:
            raise
        log.configure().error("%s", fault)  # the launcher reads it there
        return fault.exit_code
    logger = log.configure()
    started = time.monotonic()
    code = 0
    try:
        metrics = execute(stage, folder, part, rank=rank)
        result = RankResult(rank, "done", metrics=metrics if rank == 0 else {})
    except (Exception, SystemExit) as error:
        result = failure(rank, error, folder)
        code = error.exit_code if isinstance(error, MinitronError) else 2 if result.status == "refused" else 1
        if not launched:
            logger.log(logging.ERROR, "%s", result.message)
    result.seconds = time.monotonic() - started
    result.peak_rss_bytes, result.peak_gpu_bytes = peak_rss_bytes(), peak_gpu_bytes()
    try:
        save_result(folder, result)
    except (MinitronError, OSError) as error:
        fault = disk_fault(error, folder)
        if not code and fault is None:
            raise
        # Only the log can say it now: the launcher reads it there.
        if launched or not code:
            logger.error("%s", result.message if code else fault)
        code = code or MinitronError.exit_code
    if code:
        release_all()
        # An ordinary exit would wait for threads and for process groups whose other members do not come.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    # At its end the interpreter would search all that the stack's imports made for cycles, which takes seconds.
    gc.freeze()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:], launched=True))
