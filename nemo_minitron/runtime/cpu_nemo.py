"""The part of the CPU layer that stands in for CUDA, Apex and Transformer Engine in NeMo and NeMo-Aligner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nemo_minitron.runtime.patching import Patch

__all__ = ["PATCHES"]


def _no_timers(original: Any) -> Callable[..., str]:
    def log_megatron_timers(self: Any, timers: Any) -> str:
        return ""

    return log_megatron_timers


PATCHES: tuple[Patch, ...] = (
    Patch(
        "nemo.lightning.pytorch.callbacks.progress_printer",
        "ProgressPrinter.log_megatron_timers",
        _no_timers,
        "on_train_batch_end returns early on every rank but 0, and rank 0 alone enters the world-wide all-gather of "
        "megatron.core.timers.Timers.get_all_timers_string. Under gloo that gather pairs with the next broadcast of the "
        "other ranks: with ModelCheckpoint(save_top_k=...) all ranks hang in file_exists. The timers measure CUDA events",
    ),
)
