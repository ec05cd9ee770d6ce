"""A stage in processes that something else started (nemo_run, Slurm, torchrun): this one is one of them."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import yaml

from nemo_minitron.config import StageConfig, load
from nemo_minitron.errors import ConfigError

__all__ = ["checked", "run_in_place"]

C = TypeVar("C", bound=StageConfig)


def run_in_place(config: StageConfig) -> dict[str, Any]:
    """Run a stage on every process that an executor started; what ``minitron <stage>`` does in processes of its own.

    Args:
        config: of the stage; as many processes as its layout has must run.

    Returns:
        The figures of the record, on the rank that writes it.

    Raises:
        ConfigError: with all that is wrong with the settings.
        MinitronError: as the stage.
    """
    from nemo_minitron.stages.base import write_record
    from nemo_minitron.stages.worker import set_up, stage_module

    config = checked(config)
    started = time.monotonic()
    set_up(config)
    metrics: dict[str, Any] = stage_module(config.STAGE).run(config)
    if metrics:
        write_record(config.output, config.STAGE, config, metrics, time.monotonic() - started)
    return metrics


def checked(config: C) -> C:
    """A configuration read as the command line reads it: typed, and with every fault in one error.

    Raises:
        ConfigError: with all that is wrong with the settings.
    """
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "config.yaml"
        path.write_text(yaml.safe_dump(dataclasses.asdict(config)), encoding="utf-8")
        try:
            found = load(config.STAGE, path)
        except ConfigError as error:
            # The lines of a file that nobody wrote say nothing.
            raise ConfigError([fault.split(": ", 1)[-1] for fault in error.faults], source=config.STAGE) from None
    assert isinstance(found, type(config))
    return found
