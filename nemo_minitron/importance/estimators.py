"""The table of estimators, by their names in the configuration.

Nothing heavy is imported; a function that an entry names is imported when it is first called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_minitron.config import tables
from nemo_minitron.config.tables import Table, deferred

if TYPE_CHECKING:
    from nemo_minitron.importance.hooks import Recorder
    from nemo_minitron.importance.scores import Scores
    from nemo_minitron.shape import ModelShape

__all__ = ["ESTIMATORS", "Estimator"]


@dataclass(frozen=True)
class Estimator:
    """A way to measure how important each unit is. Exactly one of ``recorder`` and ``from_weights`` is given.

    Attributes:
        name: ``estimator`` of ``score`` and ``method`` of ``prune`` in the configuration, and in score files.
        recorder: ``(chunks, groups, criteria) -> Recorder``, which makes statistics of a running model's activations
            (:class:`~nemo_minitron.importance.hooks.Recorder`).
        from_weights: ``(checkpoint, *, fingerprint, progress) -> Scores`` by the weights alone, in one process.
        gradients: the recorder reads gradients too, so that a backward pass is needed.
        sums: bytes that the recorder keeps for each layer until the layer is done, by the shape of the whole model;
            None for a recorder that keeps O(units).
        work: ``(shape, tokens, experts of a token) -> FLOPs`` in float64 beside the passes; None for next to none.
        sequence: its fixed aggregation over the tokens of a sample, as score files name it; None if the user chooses
            the aggregation. "none" with ``batch`` "none": its scores are of all tokens together.
        batch: its fixed aggregation over samples; None if the user chooses.
        layer_score: name and meaning of its layer scores, for reports.
        note: a few words for ``--help``.
    """

    name: str
    recorder: Callable[..., Recorder] | None = None
    from_weights: Callable[..., Scores] | None = None
    gradients: bool = False
    sums: Callable[[ModelShape], int] | None = None
    work: Callable[[ModelShape, float, int], float] | None = None
    sequence: str | None = None
    batch: str | None = None
    layer_score: tuple[str, str] = ("Importance", "The estimator's score of a layer.")
    note: str = ""

    def __post_init__(self) -> None:
        if (self.recorder is None) == (self.from_weights is None):
            raise ValueError(f"estimator {self.name!r}: give exactly one of recorder and from_weights")

    @property
    def runs_model(self) -> bool:
        """Whether it runs the model on data."""
        return self.recorder is not None

    @property
    def passes(self) -> int:
        """Passes through the model over each sample, of about the cost of one forward pass."""
        return 0 if not self.runs_model else 2 if self.gradients else 1

    @property
    def default_sequence(self) -> str:
        """The aggregation over the tokens of a sample, unless the user chooses another."""
        return self.sequence or "mean"

    def criterion(self, sequence: str | None, batch: str) -> tuple[str, str]:
        """The pair of aggregations that it uses where these are given."""
        return sequence or self.default_sequence, self.batch or batch

    def sequence_fault(self, sequence: str | None) -> str | None:
        """Why the estimator cannot use an aggregation over the tokens of a sample; None if it can."""
        if not self.runs_model or self.sequence is None or sequence in (None, self.sequence):
            return None
        if self.sequence == "none":
            return f"aggregation.sequence={sequence}: {self._whole}"
        return (
            f"aggregation.sequence={sequence}: estimator={self.name} always takes the {self.sequence} over the "
            "sequence; leave it out"
        )

    def batch_fault(self, batch: str, default: str | None = None) -> str | None:
        """Why the estimator cannot use an aggregation over samples; None if it can, or it is the default."""
        if self.batch is None or batch in (default, self.batch):
            return None
        return f"aggregation.batch={batch}: {self._whole}"

    @property
    def _whole(self) -> str:
        return f"estimator={self.name} takes all tokens together and has nothing to aggregate; leave it out"


def _products(shape: ModelShape) -> int:
    """Bytes of the products of inputs of a layer's projections, in float64."""
    neurons, heads = shape.ffn_hidden_size, shape.num_attention_heads * shape.head_dim
    return 8 * ((shape.num_moe_experts or 1) * neurons**2 + heads**2)


def _elimination(shape: ModelShape, tokens: float, used: int) -> float:
    """FLOPs of the products and of the greedy eliminations, of neurons, of heads and of groups."""
    neurons, heads, experts = shape.ffn_hidden_size, shape.num_attention_heads * shape.head_dim, shape.num_moe_experts
    products = 2.0 * tokens * (used * neurons**2 + heads**2)
    return shape.num_layers * (products + 3.0 * (experts or 1) * neurons**3 + 6.0 * heads**3)


OWN_ESTIMATORS = (
    Estimator(
        "activation",
        recorder=deferred("nemo_minitron.importance.hooks:ActivationRecorder"),
        layer_score=(
            "Block influence",
            "1 − cosine of a layer's input and output: how much it changes the residual stream.",
        ),
        note="forward passes alone",
    ),
    Estimator(
        "taylor",
        recorder=deferred("nemo_minitron.importance.taylor:TaylorRecorder"),
        gradients=True,
        sequence="sum",
        layer_score=("First-order Taylor", "The loss's gradient times what a layer adds to the residual stream."),
        note="gradient x activation",
    ),
    Estimator(
        "reconstruction",
        recorder=deferred("nemo_minitron.importance.reconstruction:ReconstructionRecorder"),
        sums=_products,
        work=_elimination,
        sequence="none",
        batch="none",
        layer_score=(
            "Block influence",
            "1 − cosine of a layer's input and output: how much it changes the residual stream.",
        ),
        note="what a unit costs after the others make up for it",
    ),
    Estimator(
        "magnitude",
        from_weights=deferred("nemo_minitron.importance.magnitude:magnitude_scores"),
        sequence="none",
        layer_score=("Magnitude", "L2 norm of a layer's weights."),
        note="of the weights: in one process, without data",
    ),
)

ESTIMATORS: Table[Estimator] = tables.ESTIMATORS
"""By name. ``ESTIMATORS.register(Estimator(...))`` adds one in this process, and the entry points
``nemo_minitron.estimators`` of an installed package do so in every process, the ranks of ``minitron`` too."""
