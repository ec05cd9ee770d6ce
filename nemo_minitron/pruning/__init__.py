"""Pruning: choose the units that stay, and remove the others from a checkpoint or from a live Megatron model.

:func:`choose_units` turns scores and a target shape into :class:`~nemo_minitron.axes.KeptUnits`; the same kept units
drive :func:`prune_weights` (checkpoint to checkpoint, no process group, one tensor at a time) and the NeMo model
transforms :class:`DepthPrune` and :class:`WidthPrune` (a live model, each rank its shard). See ``docs/pruning.md``.

Importing this package imports neither torch nor Megatron.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_minitron._lazy import lazy

if TYPE_CHECKING:
    from nemo_minitron.pruning.choose import choose_units, target_shape
    from nemo_minitron.pruning.kept import load_kept, save_kept
    from nemo_minitron.pruning.merging import merge_pruned_heads
    from nemo_minitron.pruning.nemo import PruneTransform
    from nemo_minitron.pruning.rounds import intermediate_shapes
    from nemo_minitron.pruning.transforms import DepthPrune, WidthPrune
    from nemo_minitron.pruning.weights import prune_weights

__all__ = [
    "DepthPrune",
    "PruneTransform",
    "WidthPrune",
    "choose_units",
    "intermediate_shapes",
    "load_kept",
    "merge_pruned_heads",
    "prune_weights",
    "save_kept",
    "target_shape",
]

# torch is imported when something is asked for, not when a plan merely imports the package
__getattr__ = lazy(
    __name__,
    {
        "DepthPrune": "transforms",
        "PruneTransform": "nemo",
        "WidthPrune": "transforms",
        "choose_units": "choose",
        "intermediate_shapes": "rounds",
        "load_kept": "kept",
        "merge_pruned_heads": "merging",
        "prune_weights": "weights",
        "save_kept": "kept",
        "target_shape": "choose",
    },
)
