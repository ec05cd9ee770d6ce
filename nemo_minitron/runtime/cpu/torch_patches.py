"""The part of the CPU layer that stands in for ``torch.cuda``.

Code written for one GPU a process keeps running: the "current CUDA device" is the CPU, moving there is a no-op, streams
and events are always done, the CUDA generator is the CPU generator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode

from nemo_minitron.runtime.cpu.patching import Patch

__all__ = ["PATCHES", "CudaMeansCpu", "naming_no_device"]

CPU = torch.device("cpu")


def _is_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and (value == "cuda" or value.startswith("cuda:"))


class CudaMeansCpu(TorchFunctionMode):
    """Rewrites ``device="cuda"`` arguments of every torch function to the CPU, and asks for no pinned memory.

    Stands for literals such as ``torch.tensor([0.0], device="cuda")`` in ``megatron/core/optimizer/optimizer.py`` and
    ``megatron/core/pipeline_parallel/schedules.py``, and ``torch.tensor(..., pin_memory=True)`` where Megatron slices
    batches and rotary tables for a context-parallel rank (``get_batch_on_this_cp_rank``,
    ``get_pos_emb_on_this_cp_rank``).
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if _is_cuda(device) or type(device) is int:  # a bare number means a CUDA device
            kwargs = {**kwargs, "device": CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        # Positional devices occur only in conversions: tensor.to("cuda"), tensor.to(torch.cuda.current_device()).
        if func is torch.Tensor.to and len(args) > 1 and (_is_cuda(args[1]) or type(args[1]) is int):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


def naming_no_device() -> contextlib.AbstractContextManager[None]:
    """For code that names no device: within the block :class:`CudaMeansCpu` is off, which saves microseconds a call."""
    return torch._C.DisableTorchFunction()


def _engine(original: Any) -> Callable[..., Any]:
    def _engine_run_backward(*args: Any, **kwargs: Any) -> Any:
        with CudaMeansCpu():
            return original(*args, **kwargs)

    return _engine_run_backward


def _module_to(original: Any) -> Callable[..., torch.nn.Module]:
    def to(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        args = tuple(CPU if _is_cuda(value) or type(value) is int else value for value in args)
        if _is_cuda(kwargs.get("device")) or type(kwargs.get("device")) is int:
            kwargs["device"] = CPU
        return original(self, *args, **kwargs)

    return to


class _Stream:
    """A stream on which everything has already happened."""

    cuda_stream = 0
    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def query(self) -> bool:
        return True

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = wait_event = synchronize = record = wait = _nothing

    def record_event(self, event: _Stream | None = None) -> _Stream:
        return event or _Stream()

    def elapsed_time(self, other: _Stream) -> float:
        return 0.0


def _returning(value: Any) -> Callable[[Any], Callable[..., Any]]:
    """Replace by a function that returns ``value``."""

    def make(original: Any) -> Callable[..., Any]:
        def constant(*args: Any, **kwargs: Any) -> Any:
            return value

        return constant

    return make


def _by(replacement: Any) -> Callable[[Any], Any]:
    """Replace by ``replacement`` itself."""
    return lambda original: replacement


def _identity(original: Any) -> Callable[..., Any]:
    def cuda(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    return cuda


def _type(original: Any) -> Callable[..., Any]:
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            # Through the function mode, torch looks the method up again and finds this one: the answer may be ready.
            name: str = original(self)
            if self.device.type != "cpu" or name.startswith("torch.cuda."):
                return name
            return name.replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return original(self, dtype, *args, **kwargs)

    return type_


def _stream_context(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _seed(seed: int) -> None:
    torch.random.default_generator.manual_seed(int(seed))


def _get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.random.default_generator.get_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    torch.random.default_generator.set_state(new_state)


def _initial_seed() -> int:
    return torch.random.default_generator.initial_seed()


_NO_OPS = (
    "set_device",
    "synchronize",
    "empty_cache",
    "ipc_collect",
    "init",
    "set_stream",
    "reset_peak_memory_stats",
    "reset_max_memory_allocated",
    "reset_max_memory_cached",
)
_ZEROS = (
    "memory_allocated",
    "max_memory_allocated",
    "memory_reserved",
    "max_memory_reserved",
    "memory_cached",
    "max_memory_cached",
)
_TENSOR_TYPES = ("FloatTensor", "HalfTensor", "BFloat16Tensor", "LongTensor", "IntTensor", "BoolTensor", "ByteTensor")
_PROPERTIES = SimpleNamespace(name="cpu", major=0, minor=0, multi_processor_count=1, total_memory=0)

PATCHES: tuple[Patch, ...] = (
    Patch(
        "torch.cuda",
        "current_device",
        _returning(0),
        "raises 'Torch not compiled with CUDA enabled'; used as a device argument throughout megatron.core "
        "(tensor_parallel/mappings.py, pipeline_parallel/p2p_communication.py)",
    ),
    Patch(
        "torch.cuda",
        "device_count",
        _returning(1),
        "0 makes NeMo skip model_parallel_cuda_manual_seed (nemo/lightning/_strategy_lib.py, init_model_parallel), "
        "so that megatron's weight initialisation finds no generator",
    ),
    Patch(
        "torch.cuda",
        "is_available",
        _returning(False),
        "in a build with CUDA it is device_count() > 0 once lightning.fabric.accelerators.cuda has set "
        "PYTORCH_NVML_BASED_CUDA_CHECK, and device_count answers 1 under this layer",
    ),
    Patch(
        "torch.cuda",
        "is_initialized",
        _returning(True),
        "nemo.lightning.io.pl._fix_tensors_device asserts it when a checkpoint is loaded",
    ),
    *(Patch("torch.cuda", name, _returning(None), "needs a device; a CPU has nothing to do") for name in _NO_OPS),
    *(Patch("torch.cuda", name, _returning(0), "needs a device; no CUDA memory is in use") for name in _ZEROS),
    Patch("torch.cuda", "memory_stats", _returning({}), "needs a device (nemo/lightning memory callbacks)"),
    Patch("torch.cuda", "get_device_name", _returning("cpu"), "needs a device"),
    Patch("torch.cuda", "get_device_capability", _returning((0, 0)), "needs a device (megatron.core.utils)"),
    Patch("torch.cuda", "get_device_properties", _returning(_PROPERTIES), "needs a device"),
    Patch("torch.cuda", "Stream", _by(_Stream), "needs a device (megatron.core.distributed.DistributedDataParallel)"),
    Patch("torch.cuda", "Event", _by(_Stream), "needs a device (megatron.core.timers, NeMo timing callbacks)"),
    Patch("torch.cuda", "stream", _by(_stream_context), "needs a device (param_and_grad_buffer.start_grad_sync)"),
    Patch("torch.cuda", "current_stream", _returning(_Stream()), "needs a device"),
    Patch("torch.cuda", "default_stream", _returning(_Stream()), "needs a device (param_and_grad_buffer)"),
    Patch("torch.cuda.nvtx", "range_push", _returning(0), "NVTX is not in a CPU build (megatron.core.utils)"),
    Patch("torch.cuda.nvtx", "range_pop", _returning(0), "as range_push"),
    *(
        Patch(module, name, _by(function), "there is one generator, the CPU's (megatron.core.tensor_parallel.random)")
        for module in ("torch.cuda", "torch.cuda.random")
        for name, function in (
            ("get_rng_state", _get_rng_state),
            ("set_rng_state", _set_rng_state),
            ("manual_seed", _seed),
            ("manual_seed_all", _seed),
            ("initial_seed", _initial_seed),
        )
    ),
    *(
        Patch(
            "torch.cuda",
            name,
            _by(getattr(torch, name)),
            "allocates on a device; also asked by isinstance (NeMo-Aligner)",
        )
        for name in _TENSOR_TYPES
    ),
    Patch(
        "torch.autograd",
        "_engine_run_backward",
        _engine,
        "torch leaves a function mode while it runs the function, torch.autograd.backward too; the mode that rewrites "
        "device='cuda' is switched on again for the backward passes of autograd functions",
    ),
    Patch("torch", "nn.Module.to", _module_to, "parses its device in C++, where no function mode sees it"),
    Patch("torch", "Tensor.cuda", _identity, "a model or batch is moved to 'cuda' before use (nemo gpt_data_step)"),
    Patch("torch", "nn.Module.cuda", _identity, "as Tensor.cuda (nemo.lightning.megatron_parallel)"),
    Patch(
        "torch",
        "Tensor.type",
        _type,
        "megatron.core.optimizer compares param.type() with 'torch.cuda.FloatTensor' "
        "(optimizer.py and distrib_optimizer.py build their parameter groups by it)",
    ),
)
