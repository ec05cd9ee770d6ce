"""Run a stage in processes that another launcher started (nemo_run, Slurm, torchrun)."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import yaml

from nemo_minitron.config import StageConfig, load
from nemo_minitron.errors import ConfigError, MinitronError
from nemo_minitron.jobs import slurm_environment
from nemo_minitron.jobs.atomic import check_output
from nemo_minitron.jobs.dry_run import check_stage_space
from nemo_minitron.jobs.modules import stage_module
from nemo_minitron.jobs.needs import check_needs
from nemo_minitron.jobs.output import Output
from nemo_minitron.jobs.skipped import run_module
from nemo_minitron.runtime.environment import hide_launchers

__all__ = ["checked", "run_in_place"]

C = TypeVar("C", bound=StageConfig)

#: Of this process; every rank of a job runs the same.
_STAGES = itertools.count()


def run_in_place(config: StageConfig) -> dict[str, Any]:
    """Run a stage in this process and all others that an executor started. ``minitron <stage>`` starts its own.

    The rank comes from a launcher such as torchrun, or else from Slurm's ``srun``. ``resume`` and ``overwrite`` mean
    the same as there: see :meth:`~nemo_minitron.jobs.output.Output.check_resumable` and
    :meth:`~nemo_minitron.jobs.output.Output.replacing`.

    Args:
        config: of the stage; the number of processes must be that of its layout.

    Returns:
        The figures of the record, on the rank that writes it.

    Raises:
        ConfigError: with all that is wrong with the settings.
        MinitronError: as the stage.
    """
    from nemo_minitron.jobs.worker import set_up

    config = checked(config)
    check_needs([config])
    if slurm_environment.is_rank():
        slurm_environment.translate()
    elif "RANK" not in os.environ:  # alone, though perhaps inside a script of several tasks
        hide_launchers()
    # As for the process groups: a process that no launcher started is a world of one.
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != config.processes:
        raise ConfigError(
            f"the layout makes {config.processes} processes, {world} were started; give the executor as many tasks as "
            "there are ranks, or change parallel"
        )
    started = time.monotonic()
    set_up(config)
    with _prepared(config) as output:
        metrics = run_module(stage_module(config.STAGE), output.settled(), rank=int(os.environ.get("RANK", "0")))
        if metrics:
            output.finish(metrics, time.monotonic() - started)
    return metrics


@contextlib.contextmanager
def _prepared(config: StageConfig) -> Iterator[Output]:
    """Rank 0 checks the output and moves an old one away; the other ranks wait for it.

    Yields:
        The output. A job that is queued again resumes it instead of overwriting it.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    store, key = None, f"minitron/stage-{next(_STAGES)}"  # what rank 0 says: whether to overwrite, or why it refuses
    if world > 1:
        from torch.distributed import rendezvous

        # The process group meets there too, later: the store is kept until then, and has room for both.
        store, *_ = next(rendezvous("env://"))
    output = Output(config)
    with contextlib.ExitStack() as replaced:
        if rank == 0:
            try:
                replaced.enter_context(output.leased())
                if output.is_requeued_job():
                    output = output.replaced_by(overwrite=False)
                if output.config.overwrite or not output.resumable:
                    check_output(output.path, output.config.overwrite)
                output.check_resumable()
                output.check_inputs()
                check_stage_space(output)
                replaced.enter_context(output.replacing())
                output.begin()
            except MinitronError as error:
                if store is not None:
                    store.set(key, json.dumps({"refused": getattr(error, "faults", [str(error)])}))
                raise
            if store is not None:
                store.set(key, json.dumps({"overwrite": output.config.overwrite}))
        elif store is not None:
            answer = json.loads(store.get(key))
            if "refused" in answer:
                raise ConfigError(answer["refused"])
            output = output.replaced_by(overwrite=answer["overwrite"])
        yield output


def checked(config: C) -> C:
    """A configuration, checked as by the command line: typed, and with every fault in one error.

    Raises:
        ConfigError: with all that is wrong with the settings.
    """
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "config.yaml"
        path.write_text(yaml.safe_dump(dataclasses.asdict(config)), encoding="utf-8")
        try:
            loaded = load(config.STAGE, path)
        except ConfigError as error:
            # The lines of a file that nobody wrote say nothing.
            raise ConfigError([fault.split(": ", 1)[-1] for fault in error.faults], source=config.STAGE) from None
    assert isinstance(loaded, type(config))
    return loaded
