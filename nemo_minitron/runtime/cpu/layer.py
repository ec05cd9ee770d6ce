"""The CPU layer: Megatron-core, NeMo 2 and NeMo-Aligner without CUDA, Apex or Transformer Engine.

:func:`activate` is called once in a process, and only where there is no CUDA or the user asked for the CPU: by a stage
at its start, otherwise by the first function that needs a device (:func:`ensure`). It changes nothing on disk. Each
patch says in its ``why`` what upstream does there; ``python -m nemo_minitron.runtime.cpu`` prints them all, as the
table in ``docs/runtime.md``.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from nemo_minitron.runtime import device as devices

if TYPE_CHECKING:
    from nemo_minitron.runtime.cpu.patching import Patch, PatchSet

__all__ = ["activate", "complete", "deactivate", "ensure", "is_active", "markdown", "needed", "patches", "prepare"]

#: CUDA-only packages of NVIDIA's containers. Megatron and NeMo do without them where they cannot be imported, and on a
#: node without a driver (a login node) importing them may end the process.
_HIDDEN = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C")

_state: dict[str, Any] = {}


def needed(device: str) -> bool:
    """Whether a process on ``device`` ("auto", "cpu", "cuda") runs on the CPU layer.

    Raises:
        ConfigError: see :func:`~nemo_minitron.runtime.device.decide`.
    """
    return not devices.decide(device).is_cuda


def prepare(device: str = "auto") -> devices.Device:
    """Decide on the device of this process and prepare the stack for it. Every process calls this first.

    Args:
        device: "auto", "cpu" or "cuda".

    Returns:
        The device. On the CPU the layer is on; on CUDA, substitutes are installed for Apex and Transformer Engine if
        they are missing.

    Raises:
        ConfigError: see :func:`~nemo_minitron.runtime.device.decide`.
    """
    if needed(device):
        activate()
    else:
        complete()
    return devices.here()


def ensure(device: devices.Device | None = None) -> devices.Device:
    """The device of this process; on the CPU the layer is on afterwards. On CUDA nothing is changed. Idempotent.

    The functions with which a script of the user's begins call it (groups, trainers, transforms), so that such a script
    need not call :func:`prepare`.

    Args:
        device: of this process; None for the one decided on, or else decided on now, as for "auto".

    Raises:
        ConfigError: for the CPU, in a process that has begun on CUDA.
    """
    device = device or devices.here()
    if not device.is_cuda and not is_active():
        activate()
    return device


def patches() -> tuple[Patch, ...]:
    """All patches of the layer."""
    from nemo_minitron.runtime.cpu import megatron_patches, nemo_patches, torch_patches

    return (*torch_patches.PATCHES, *megatron_patches.PATCHES, *nemo_patches.PATCHES)


def is_active() -> bool:
    """Whether the layer is on in this process."""
    return "mode" in _state


def activate(*, silent: bool = True) -> None:
    """Switch the layer on, and settle this process on the CPU. Idempotent.

    It makes no difference whether torch, Lightning, NeMo or Megatron were imported before, nor whether torch is a build
    with CUDA in it.

    Args:
        silent: drop the messages that the stack prints at every start without a GPU
            (:mod:`nemo_minitron.runtime.cpu.quiet`).

    Raises:
        ConfigError: in a process that has begun on CUDA.
    """
    if _state:
        return
    devices.decide("cpu")
    from nemo_minitron.runtime.cpu.quiet import quiet

    if silent:
        quiet()  # before torch is imported: its first import has something to say
    from nemo_minitron.runtime.cpu.patching import PatchSet
    from nemo_minitron.runtime.cpu.torch_patches import CudaMeansCpu

    patch_set = PatchSet(patches())
    mode = CudaMeansCpu()
    _state["patches"], _state["mode"] = patch_set, mode
    _state["hidden"] = [name for name in _HIDDEN if name not in sys.modules]
    sys.modules.update(dict.fromkeys(_state["hidden"]))  # type: ignore[arg-type]  # None: importing it fails
    patch_set.activate()
    mode.__enter__()


def complete() -> None:
    """On a CUDA device: install substitutes for Apex and Transformer Engine if they are missing. Idempotent.

    Megatron-core's local layers, NeMo 1 and NeMo-Aligner then run as they do on the CPU, on the device.
    """
    if _state:
        return
    from nemo_minitron.runtime.cpu.patching import PatchSet

    device = devices.here()
    missing = set() if device.transformer_engine else {"transformer_engine"}
    if importlib.util.find_spec("apex") is None:
        missing.add("apex")
    wanted = tuple(patch for patch in patches() if patch.lacking in missing)
    if device.is_cuda and wanted:
        _state["patches"] = PatchSet(wanted)
        _state["patches"].activate()


def deactivate() -> None:
    """Switch the layer off and restore every module. Idempotent."""
    if not _state:
        return
    from nemo_minitron.runtime.cpu.quiet import loud

    if "mode" in _state:
        _state["mode"].__exit__(None, None, None)
    patch_set: PatchSet = _state["patches"]
    patch_set.deactivate()
    for name in _state.get("hidden", ()):
        sys.modules.pop(name, None)
    loud()
    _state.clear()
    devices.forget()


def markdown() -> str:
    """The table of patches for ``docs/runtime.md``; patches of one module with one reason share a row."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for patch in patches():
        rows.setdefault((patch.module, patch.lacking, patch.why), []).append(patch.attribute)
    lines = ["| module | attribute | without | what upstream does there |", "|---|---|---|---|"]
    without = {"cuda": "CUDA", "apex": "Apex", "transformer_engine": "Transformer Engine"}
    for (module, lacking, why), names in rows.items():
        lines.append(f"| `{module}` | {', '.join(f'`{name}`' for name in names)} | {without[lacking]} | {why} |")
    return "\n".join(lines)
