"""How important each unit of a model is (Minitron, arXiv 2407.14679 section 2.2, 2408.11796).

:func:`score_model` and :func:`score_criteria` run a live Megatron model (activations, or gradient x activation),
:func:`score_streamed` runs it layer by layer,
:func:`layer_importance` runs it without some of its layers (:func:`layer_importance_streamed` layer by layer),
:class:`ScoreDuringValidation` lets NeMo run it, and
:func:`magnitude_scores` reads weights. :class:`Scores` and :class:`DepthScores` are the results on disk. Importing
this package imports neither torch nor Megatron.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_minitron._lazy import lazy

if TYPE_CHECKING:
    from nemo_minitron.importance.aggregation import AGGREGATIONS, Aggregation, Criterion
    from nemo_minitron.importance.callback import ScoreDuringValidation
    from nemo_minitron.importance.depth import layer_importance, task_accuracy
    from nemo_minitron.importance.depth_scores import DepthScores, Measurement
    from nemo_minitron.importance.depth_streamed import layer_importance_streamed
    from nemo_minitron.importance.magnitude import magnitude_scores
    from nemo_minitron.importance.masking import left_out
    from nemo_minitron.importance.score import score_criteria, score_model
    from nemo_minitron.importance.scores import Scores, fingerprint, save_criteria
    from nemo_minitron.importance.streamed import score_streamed

__all__ = [
    "AGGREGATIONS",
    "Aggregation",
    "Criterion",
    "DepthScores",
    "Measurement",
    "ScoreDuringValidation",
    "Scores",
    "fingerprint",
    "layer_importance",
    "layer_importance_streamed",
    "left_out",
    "magnitude_scores",
    "save_criteria",
    "score_criteria",
    "score_model",
    "score_streamed",
    "task_accuracy",
]

# torch is imported when something is asked for, not when a plan merely imports the package
__getattr__ = lazy(
    __name__,
    {
        "AGGREGATIONS": "aggregation",
        "Aggregation": "aggregation",
        "Criterion": "aggregation",
        "DepthScores": "depth_scores",
        "Measurement": "depth_scores",
        "ScoreDuringValidation": "callback",
        "Scores": "scores",
        "fingerprint": "scores",
        "layer_importance": "depth",
        "layer_importance_streamed": "depth_streamed",
        "left_out": "masking",
        "magnitude_scores": "magnitude",
        "save_criteria": "scores",
        "score_criteria": "score",
        "score_model": "score",
        "score_streamed": "streamed",
        "task_accuracy": "depth",
    },
)
