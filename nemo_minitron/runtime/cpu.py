"""The CPU layer: Megatron-core, NeMo 2 and NeMo-Aligner without CUDA, Apex or Transformer Engine.

:func:`activate` is called once, at the start of a process, before the stack is imported, and only where there is no
CUDA or the user asked for the CPU. It changes nothing on disk. Each patch says in its ``why`` what upstream does there;
``python -m nemo_minitron.runtime.cpu`` prints them all, as the table in ``docs/runtime.md``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import ConfigError

if TYPE_CHECKING:
    from nemo_minitron.runtime.patching import Patch, PatchSet

__all__ = ["activate", "deactivate", "is_active", "markdown", "needed", "patches"]

_state: dict[str, Any] = {}


def needed(device: str) -> bool:
    """Whether a process on ``device`` ("auto", "cpu", "cuda") runs on the CPU layer.

    Raises:
        ConfigError: for "cuda" where there is none, and for any other word.
    """
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"runtime.device={device!r}: must be auto, cpu or cuda")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError("runtime.device=cuda: no CUDA device is visible; use runtime.device=auto or cpu")
    return device == "cpu" or not available


def patches() -> tuple[Patch, ...]:
    """All patches of the layer."""
    from nemo_minitron.runtime import cpu_megatron, cpu_nemo, cpu_torch

    return (*cpu_torch.PATCHES, *cpu_megatron.PATCHES, *cpu_nemo.PATCHES)


def is_active() -> bool:
    """Whether the layer is on in this process."""
    return bool(_state)


def activate(*, silent: bool = True) -> None:
    """Switch the layer on. Idempotent.

    Args:
        silent: drop what the stack says at every start without a GPU (:mod:`nemo_minitron.runtime.quiet`).
    """
    if _state:
        return
    from nemo_minitron.runtime.quiet import quiet

    if silent:
        quiet()  # before torch is imported: its first import has something to say
    from nemo_minitron.runtime.cpu_torch import CudaMeansCpu
    from nemo_minitron.runtime.patching import PatchSet

    patch_set = PatchSet(patches())
    mode = CudaMeansCpu()
    _state["patches"], _state["mode"] = patch_set, mode
    patch_set.activate()
    mode.__enter__()


def deactivate() -> None:
    """Switch the layer off and leave every module as it was found. Idempotent."""
    if not _state:
        return
    from nemo_minitron.runtime.quiet import loud

    _state["mode"].__exit__(None, None, None)
    patch_set: PatchSet = _state["patches"]
    patch_set.deactivate()
    loud()
    _state.clear()


def markdown() -> str:
    """The table of patches for ``docs/runtime.md``; patches of one module with one reason share a row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for patch in patches():
        rows.setdefault((patch.module, patch.why), []).append(patch.attribute)
    lines = ["| module | attribute | what upstream does there |", "|---|---|---|"]
    for (module, why), names in rows.items():
        lines.append(f"| `{module}` | {', '.join(f'`{name}`' for name in names)} | {why} |")
    return "\n".join(lines)


if __name__ == "__main__":
    from nemo_minitron.runtime.quiet import quiet

    quiet()
    print(markdown())
