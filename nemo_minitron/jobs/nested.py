"""Stages that another stage starts, each in processes of its own."""

from __future__ import annotations

import sys
from typing import Any

from nemo_minitron.config import StageConfig
from nemo_minitron.jobs.local import run_output
from nemo_minitron.jobs.output import Output
from nemo_minitron.jobs.warm import keep_pool

__all__ = ["run_child", "show_output"]


def run_child(stage: StageConfig) -> dict[str, Any]:
    """Run a stage unless it is done; an output of other settings is archived.

    Returns:
        Its record.

    Raises:
        MinitronError: if the stage refused its settings or inputs.
    """
    keep_pool(stage.runtime.device)
    output = Output(stage)
    if (record := output.done_record()) is not None:
        return record
    with output.leased():
        todo = output.prepare()
        if todo is None:
            record = output.record()
            assert record is not None  # that is what "done" means
            return record
        return run_output(todo, show_output)


def show_output(data: bytes) -> None:
    """Pass on what rank 0 of a stage prints."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
