"""Refit the matrices of a pruned model to its teacher by least squares, layer by layer.

What pruning took away is made up for, as far as what stayed can do it: each matrix is solved for, so that the pruned
model's hidden states come close to the teacher's on calibration text. Gradient steps on each layer alone may follow.
See ``docs/reconstruction.md``.
"""

from nemo_minitron._lazy import lazy

__all__ = [
    "BlockTraining",
    "Fit",
    "LayerReport",
    "RefittedLayers",
    "ReplacedWeights",
    "Sums",
    "TensorsReplaced",
    "check_cut",
    "reconstruct",
    "solve",
]

__getattr__ = lazy(
    __name__,
    {
        "BlockTraining": "block",
        "Fit": "least_squares",
        "LayerReport": "streams",
        "RefittedLayers": "progress",
        "ReplacedWeights": "weights",
        "Sums": "least_squares",
        "TensorsReplaced": "weights",
        "check_cut": "weights",
        "reconstruct": "streams",
        "solve": "least_squares",
    },
)
