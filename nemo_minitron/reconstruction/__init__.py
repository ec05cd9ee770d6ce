"""Refit the matrices of a pruned model to its teacher by least squares, layer by layer, without gradients.

What pruning took away is made up for, as far as what stayed can do it: each matrix is solved for, so that the pruned
model's hidden states come close to the teacher's on calibration text. See ``docs/reconstruction.md``.
"""

from nemo_minitron._lazy import lazy

__all__ = ["Fit", "LayerReport", "RefittedLayers", "ReplacedWeights", "Sums", "check_cut", "reconstruct", "solve"]

__getattr__ = lazy(
    __name__,
    {
        "Fit": "least_squares",
        "LayerReport": "streams",
        "RefittedLayers": "progress",
        "ReplacedWeights": "weights",
        "Sums": "least_squares",
        "check_cut": "weights",
        "reconstruct": "streams",
        "solve": "least_squares",
    },
)
