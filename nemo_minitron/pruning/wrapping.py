"""Remove the wrappers that NeMo and Megatron put around a model for training, and put them back after pruning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nemo_minitron.errors import ShapeError
from nemo_minitron.pruning.live import gpt_chunks, like_parameter, owned_parameters
from nemo_minitron.shape import SIZES

if TYPE_CHECKING:
    from nemo.lightning.megatron_parallel import MegatronParallel

__all__ = ["unwrapped", "update_io", "without_ddp"]


@contextmanager
def without_ddp(module: nn.Module) -> Iterator[None]:
    """Within the block ``module`` has no DistributedDataParallel wrapper; see :func:`unwrapped`.

    Raises:
        ShapeError: for a model that is wrapped outside of NeMo's trainer, where its optimizer is not known.
    """
    from megatron.core.distributed import DistributedDataParallel

    if any(isinstance(part, DistributedDataParallel) for part in module.modules()) and hasattr(module, "teardown_ddp"):
        with unwrapped(module):
            yield
    elif any(hasattr(parameter, "main_grad") for parameter in module.parameters()):
        raise ShapeError(
            "the model is already wrapped in Megatron's DistributedDataParallel, whose gradient buffers (and the "
            "optimizer) hold the unpruned parameters; prune it before it is wrapped, or give the transform NeMo's "
            "MegatronParallel"
        )
    else:
        yield


@contextmanager
def unwrapped(module: MegatronParallel) -> Iterator[None]:
    """Within the block NeMo's model has no wrapper; after it, it has a new one with buffers and an optimizer that fit.

    Memory: the parameters are copied out of Megatron's buffers one by one, so the unpruned parameters exist twice for a
    moment. :class:`~nemo_minitron.pruning.PruneTransform` avoids that.

    Args:
        module: NeMo's ``MegatronParallel``, wrapped for training.

    Raises:
        ShapeError: if its optimizer holds a state already.
    """
    from lightning.pytorch.trainer.states import TrainerFn

    trainer: Any = module.trainer
    fitting = trainer.state.fn == TrainerFn.FITTING
    if fitting and any(_has_state(optimizer) for optimizer in trainer.strategy.optimizers):
        raise ShapeError(
            "the optimizer has taken steps already, or was restored; its state is of the unpruned parameters. Prune at "
            "the start of a training, and go on from its checkpoints with PruneTransform"
        )
    if fitting:
        trainer.strategy.optimizers = []
    module.teardown_ddp()
    for chunk in module:
        del chunk.original_getattr
        chunk.module = chunk.module.module
        vars(chunk).pop("buffers", None)
    for chunk in gpt_chunks(module):
        for _, parameter, owners in owned_parameters(chunk):
            # A copy outside the buffers, without the hooks that gather gradients.
            own = like_parameter(parameter, parameter.detach().clone())
            for owner, leaf in owners:
                setattr(owner, leaf, own)
    yield
    module.init_ddp()
    if fitting:
        trainer.strategy.setup_optimizers(trainer)
    update_io(trainer.lightning_module)


def _has_state(optimizer: Any) -> bool:
    """Whether an optimizer, Megatron's or torch's, has taken a step."""
    inner = getattr(optimizer, "mcore_optimizer", optimizer)
    chained = getattr(inner, "chained_optimizers", [inner])
    states = [getattr(part, "optimizer", part) for part in chained]
    return any(
        float(torch.as_tensor(entry["step"])) > 0
        for part in states
        if part is not None
        for entry in part.state.values()
        if isinstance(entry, dict) and "step" in entry
    )


def update_io(pl_module: Any) -> None:
    """Set the pruned sizes in the configuration from which NeMo writes a checkpoint's ``context/``."""
    made_from = getattr(getattr(pl_module, "__io__", None), "config", None)
    for name in (*SIZES, "kv_channels", "moe_ffn_hidden_size"):
        if made_from is not None:
            setattr(made_from, name, getattr(pl_module.config, name))
