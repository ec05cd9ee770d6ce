"""Code of the stages that can run a model layer by layer: the decision, the model, the files of a pass."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nemo_minitron import axes
from nemo_minitron.checkpoints.model_record import peek_family, peek_shape
from nemo_minitron.checkpoints.weights import DTYPES
from nemo_minitron.config.parts import parse_bytes
from nemo_minitron.jobs.plans import StagePlan, human_bytes
from nemo_minitron.runtime.memory import LIVE_SHARE, host_memory
from nemo_minitron.stages.shared.memory import Running
from nemo_minitron.streamed import streamed_faults

if TYPE_CHECKING:
    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.runtime.groups import Groups
    from nemo_minitron.streamed import StreamedModel, Trail

__all__ = ["plan_streaming", "scratch", "state_budget", "streamed_model", "streams", "trail"]

logger = logging.getLogger(__name__)


class Spilling(Running, Protocol):
    """Settings of a stage that keeps hidden states between layers."""

    output: str
    states_memory: str


class Streaming(Spilling, Protocol):
    """Settings of a stage that can stream, or not."""

    memory: str


def plan_streaming(plan: StagePlan, config: Streaming, *models: str) -> None:
    """Add to a plan why models cannot be streamed, if that is asked for, and what is in memory."""
    if config.memory != "streamed":
        return
    for model in models:
        shape = peek_shape(model)
        plan.faults += [fault for fault in streamed_faults(shape, config.parallel) if fault not in plan.faults]
        if shape is not None:
            size = DTYPES.get(config.runtime.dtype, DTYPES["float32"])  # auto: at most
            layer = axes.layer_count(peek_family(model), shape) * size
            vocabulary = shape.vocab_size * shape.hidden_size * size
            plan.costs["memory of a rank"] = (
                f"about {human_bytes(max(layer, vocabulary))} of weights (a part at a time), beside up to "
                f"{config.states_memory} of hidden states"
            )


def streams(config: Streaming, checkpoint: Checkpoint, groups: Groups, *, beside: float = 0.0) -> bool:
    """Whether the model runs layer by layer: by the setting, else by the free memory. Collective.

    Args:
        config: of the stage.
        checkpoint: of the model.
        groups: of this process.
        beside: bytes that a process with the whole model needs beside its weights.
    """
    import torch
    import torch.distributed as dist

    if config.memory != "auto" or streamed_faults(checkpoint.shape, groups.layout):
        return config.memory == "streamed"
    count = axes.parameter_count(checkpoint.family, checkpoint.shape)
    needed = count * DTYPES[config.runtime.dtype] + beside
    if groups.device.is_cuda:
        free = torch.cuda.mem_get_info()[0]
    else:
        free = host_memory()[1]
        needed *= int(os.environ.get("LOCAL_WORLD_SIZE", str(groups.layout.world_size)))
    short = torch.tensor([int(needed > LIVE_SHARE * free)], device=groups.device.torch)
    dist.all_reduce(short, dist.ReduceOp.MAX)
    if int(short) and groups.is_main:
        logger.info(
            "%s: %s of weights%s do not fit into %s of free memory; streaming layer by layer (memory=streamed)",
            checkpoint.path, human_bytes(needed), " and sums" if beside else "", human_bytes(free),
        )  # fmt: skip
    return bool(int(short))


def streamed_model(config: Spilling, checkpoint: Checkpoint, groups: Groups) -> StreamedModel:
    """The model, one part of it in memory at a time, in the stage's precision."""
    import torch

    from nemo_minitron.streamed import StreamedModel

    return StreamedModel(checkpoint, groups, dtype=getattr(torch, config.runtime.dtype))


def state_budget(config: Spilling) -> int:
    """Bytes of hidden states that a process keeps in memory."""
    return parse_bytes(config.states_memory)


def scratch(config: Spilling) -> Path:
    """The directory for the files of a pass, beside the output, so that a later process finds them."""
    output = Path(config.output)
    return output.with_name(f".{output.name}.pass")


def trail(config: Spilling, groups: Groups, subject: dict[str, Any]) -> Trail:
    """What saves a pass, so that a later process goes on.

    Args:
        config: of the stage.
        groups: of this process.
        subject: JSON values that the pass depends on.
    """
    from nemo_minitron.streamed import Trail

    return Trail(scratch(config), subject, groups)
