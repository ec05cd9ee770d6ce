"""The device that this process computes on: determined once, at process start, and passed by value afterwards.

:func:`decide` is the only place that asks torch whether there is CUDA. Its result is kept in
:class:`~nemo_minitron.runtime.groups.Groups` and is an argument of models, trainers and strategies. Asking torch again
later is not safe: the CPU layer replaces parts of ``torch.cuda``, and importing Lightning sets
``PYTORCH_NVML_BASED_CUDA_CHECK``, which changes what ``torch.cuda.is_available`` looks at.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_minitron.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["CPU", "LAYER_SPEC_VARIABLE", "Device", "decide", "forget", "here"]

LAYER_SPEC_VARIABLE = "MINITRON_LAYER_SPEC"
"""Environment variable that insists on a layer specification: "local" or "transformer_engine"."""


@dataclass(frozen=True)
class Device:
    """The device of one process.

    Attributes:
        type: "cpu" or "cuda".
        count: CUDA devices of this node; 0 on the CPU.
        transformer_engine: layers are Transformer Engine's; otherwise Megatron-core's own ("local").
    """

    type: str
    count: int = 0
    transformer_engine: bool = False

    @property
    def is_cuda(self) -> bool:
        """This process computes on a CUDA device."""
        return self.type == "cuda"

    @property
    def backend(self) -> str:
        """Backend of process groups: "nccl" or "gloo"."""
        return "nccl" if self.is_cuda else "gloo"

    @property
    def accelerator(self) -> str:
        """Lightning's word for it: "gpu" or "cpu"."""
        return "gpu" if self.is_cuda else "cpu"

    @property
    def torch(self) -> torch.device:
        """The device of new tensors: under CUDA that of this process's local rank."""
        import torch

        return torch.device("cuda", self.local_index) if self.is_cuda else torch.device("cpu")

    @property
    def local_index(self) -> int:
        """Index of this process's CUDA device, from the ``LOCAL_RANK`` of its launcher."""
        index = int(os.environ.get("LOCAL_RANK", "0"))
        # A launcher that shows each process its own device alone (srun --gpus-per-task) makes all of them number 0.
        return 0 if self.count == 1 else index

    def per_node(self, world_size: int) -> int:
        """Processes of a node, of ``world_size`` in all."""
        return min(self.count, world_size) if self.is_cuda else world_size

    def use(self) -> None:
        """Make it torch's current device. Call it before the first collective."""
        if self.is_cuda:
            import torch

            torch.cuda.set_device(self.local_index)


CPU = Device("cpu")

_decided: dict[str, Device] = {}
#: Why there is no CUDA, once torch has said so.
_absent: list[str] = []


def decide(requested: str = "auto") -> Device:
    """Decide on which device this process computes. Idempotent: torch is asked by the first call alone.

    Args:
        requested: "auto" takes CUDA where there is any; "cpu" and "cuda" allow no other device.

    Raises:
        ConfigError: for "cuda" where there is none or where the process has begun on the CPU, for "cpu" where it has
            begun on CUDA, and for any other word.
    """
    if requested not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"runtime.device={requested!r}: must be auto, cpu or cuda")
    device = _decided.get("device")
    if device is None:
        device = CPU if requested == "cpu" else _ask(requested)
        _decided["device"] = device
    elif requested not in ("auto", device.type):
        if _absent:
            raise ConfigError(f"runtime.device=cuda: {_absent[0]}; use runtime.device=auto or cpu")
        raise ConfigError(
            f"runtime.device={requested}: this process has begun on {device.type}, and a process has one device; "
            "use runtime.device=auto, or another process"
        )
    return device


def here() -> Device:
    """The device of this process; if none was decided on yet, decides now, as for "auto"."""
    return decide()


def forget() -> None:
    """Undo the decision (when the CPU layer is switched off, and in tests)."""
    _decided.clear()
    _absent.clear()


def _ask(requested: str) -> Device:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        _absent[:] = [
            "no CUDA device is visible" + ("" if built else ", and the installed torch is a build without CUDA")
        ]
        if requested == "cuda":
            raise ConfigError(f"runtime.device=cuda: {_absent[0]}; use runtime.device=auto or cpu")
        return CPU
    return Device("cuda", torch.cuda.device_count(), _layers_of_transformer_engine())


def _layers_of_transformer_engine() -> bool:
    """Whether layers are Transformer Engine's: by :data:`LAYER_SPEC_VARIABLE`, else whether it is installed."""
    wanted = os.environ.get(LAYER_SPEC_VARIABLE)
    if wanted not in (None, "", "local", "transformer_engine"):
        raise ConfigError(f"{LAYER_SPEC_VARIABLE}={wanted}: must be local or transformer_engine")
    installed = importlib.util.find_spec("transformer_engine") is not None
    if wanted == "transformer_engine" and not installed:
        raise ConfigError(f"{LAYER_SPEC_VARIABLE}=transformer_engine: Transformer Engine is not installed; unset it")
    return installed and wanted != "local"
