"""The part of the CPU layer that stands in for CUDA, Apex and Transformer Engine in NeMo and NeMo-Aligner."""

from __future__ import annotations

from nemo_minitron.runtime.patching import Patch

__all__ = ["PATCHES"]

PATCHES: tuple[Patch, ...] = ()
