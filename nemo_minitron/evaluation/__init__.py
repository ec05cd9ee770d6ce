"""Numbers and text from a model: held-out loss under any layout, greedy generation. See ``docs/evaluation.md``.

Torch, Megatron and transformers are imported when a name is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_minitron.evaluation.generation import Generation, generate, generate_megatron
    from nemo_minitron.evaluation.held_out import HeldOutLoss, MeanLoss, held_out_loss

__all__ = ["Generation", "HeldOutLoss", "MeanLoss", "generate", "generate_megatron", "held_out_loss"]

_HOME = {
    "Generation": "generation",
    "HeldOutLoss": "held_out",
    "MeanLoss": "held_out",
    "generate": "generation",
    "generate_megatron": "generation",
    "held_out_loss": "held_out",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
