"""Evaluation of a model: held-out loss under any layout, benchmarks, greedy generation. See ``docs/evaluation.md``.

Torch, Megatron and transformers are imported when a name is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_minitron._lazy import lazy

if TYPE_CHECKING:
    from nemo_minitron.evaluation.generation import Generation, generate, generate_megatron
    from nemo_minitron.evaluation.held_out import HeldOutLoss, MeanLoss, held_out_loss, streamed_loss

__all__ = ["Generation", "HeldOutLoss", "MeanLoss", "generate", "generate_megatron", "held_out_loss", "streamed_loss"]

# torch is imported when something is asked for, not when a plan merely imports the package
__getattr__ = lazy(
    __name__,
    {
        "Generation": "generation",
        "HeldOutLoss": "held_out",
        "MeanLoss": "held_out",
        "generate": "generation",
        "generate_megatron": "generation",
        "held_out_loss": "held_out",
        "streamed_loss": "held_out",
    },
)
