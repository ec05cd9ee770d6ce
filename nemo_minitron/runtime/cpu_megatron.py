"""The part of the CPU layer that stands in for CUDA-only spots of Megatron-core."""

from __future__ import annotations

import queue
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

from nemo_minitron.runtime.patching import Patch

__all__ = ["PATCHES"]


def _get_state(original: Any) -> Callable[..., torch.Tensor]:
    def _get_cuda_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.random.default_generator.get_state()

    return _get_cuda_rng_state


def _set_state(original: Any) -> Callable[..., None]:
    def _set_cuda_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.random.default_generator.set_state(new_state)

    return _set_cuda_rng_state


_saving_synchronously: ContextVar[bool] = ContextVar("saving_synchronously", default=False)


def _save(original: Any) -> Callable[..., Any]:
    def save(self: Any, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        token = _saving_synchronously.set(True)
        try:
            self.async_save(sharded_state_dict, checkpoint_dir).execute_sync()
        finally:
            _saving_synchronously.reset(token)

    return save


def _results_queue(original: Any) -> Callable[[], Any]:
    results: queue.Queue[Any] = queue.Queue()

    def _get_write_results_queue() -> Any:
        return results if _saving_synchronously.get() else original()

    return _get_write_results_queue


PATCHES: tuple[Patch, ...] = (
    Patch(
        "megatron.core.tensor_parallel.random",
        "_get_cuda_rng_state",
        _get_state,
        "reads a CUDA generator; CudaRNGStatesTracker.fork (dropout, weight initialisation) calls it",
    ),
    Patch(
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        _set_state,
        "sets a CUDA generator through torch._C._cuda_setRNGState",
    ),
    Patch(
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        "_get_write_results_queue",
        _results_queue,
        "starts a manager process with 'spawn', which imports the whole stack again (about 10 s a save) and needs a "
        "__main__ guard in the caller; a synchronous save reads the queue in the process that filled it, so a plain "
        "queue does. Asynchronous saves keep the manager",
    ),
    Patch(
        "megatron.core.dist_checkpointing.strategies.base",
        "AsyncSaveShardedStrategy.save",
        _save,
        "runs even a synchronous save in a forked child; here it runs in the process itself and tells "
        "_get_write_results_queue so",
    ),
)
