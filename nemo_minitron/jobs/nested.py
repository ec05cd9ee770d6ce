"""Stages that a leading stage starts, each in processes of its own."""

from __future__ import annotations

import sys
from typing import Any

from nemo_minitron.config import StageConfig
from nemo_minitron.jobs.local import run_stage
from nemo_minitron.jobs.pipeline import prepare
from nemo_minitron.jobs.records import read_record
from nemo_minitron.jobs.warm import keep_pool

__all__ = ["run_child", "show_output"]


def run_child(stage: StageConfig) -> dict[str, Any]:
    """Run a stage unless it is done; one that was done with other settings is kept beside the new one.

    Returns:
        Its record.

    Raises:
        MinitronError: what the stage refused.
    """
    keep_pool(stage.runtime.device)
    todo = prepare(stage)
    if todo is None:
        record = read_record(stage.output)
        assert record is not None  # that is what "done" means
        return record
    return run_stage(todo, show_output)


def show_output(data: bytes) -> None:
    """Pass on what a child prints."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
