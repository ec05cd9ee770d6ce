"""Score a model layer by layer, for models that are larger than the memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from nemo_minitron.data.blocks import Blocks
from nemo_minitron.errors import ConfigError
from nemo_minitron.importance.aggregation import Criterion
from nemo_minitron.importance.estimators import ESTIMATORS
from nemo_minitron.importance.score import calibration_blocks, collect, make_recorder
from nemo_minitron.importance.scores import Scores
from nemo_minitron.streamed import Pass, StreamedModel, Trail

__all__ = ["score_streamed"]


def score_streamed(
    model: StreamedModel,
    blocks: torch.Tensor | Blocks,
    *,
    criteria: Sequence[tuple[str, str]],
    micro_batch_size: int = 1,
    estimator: str = "activation",
    fingerprint: str | None = None,
    budget: float = float("inf"),
    trail: Trail | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Scores]:
    """:func:`~nemo_minitron.importance.score.score_criteria` of a model whose layers are in memory one at a time.

    Every rank calls it, and every rank gets all scores, those of the live pass.

    Args:
        model: to be scored; its layout has data parallelism alone.
        blocks, criteria, micro_batch_size, fingerprint: as of ``score_criteria``.
        estimator: one that reads activations and no gradients.
        budget: bytes of hidden states that a rank keeps in memory; more go to a file in the trail's directory.
        trail: saves the pass between layers, and says where a stopped pass goes on; None keeps all in memory.
        progress: called with 1 for each layer that is done.

    Raises:
        ConfigError: for an estimator that reads gradients, or that is not known.
        MinitronError: as of ``score_criteria``.
    """
    groups, shape = model.groups, model.shape
    if estimator in ESTIMATORS and ESTIMATORS[estimator].gradients:
        raise ConfigError(
            f"estimator={estimator}: its gradients need the whole model in memory; set memory=live, or "
            "estimator=activation"
        )
    recorder = make_recorder([], groups, criteria, estimator)
    recorder.span = range(shape.num_layers)
    blocks = calibration_blocks(blocks, groups)
    first = None if trail is None else trail.find()
    run = Pass(model, blocks, micro_batch_size, budget=budget, file=None if trail is None else trail.spill)
    if first is None or trail is None:
        run.embed()
    else:
        recorder.restore(trail.load(run.states))
        if progress is not None:
            progress(first)
    for layer in range(first or 0, shape.num_layers):
        chunk = model.layer(layer)
        recorder.chunks = [chunk]
        run.through(chunk, around=recorder.attached())
        recorder.check_finite()
        recorder.finish()
        if trail is not None:
            trail.reach(layer + 1, run.states, recorder.saved())
        if progress is not None:
            progress(1)
    recorder.chunks = []
    model.release()
    tokens = blocks.sequence_length * len(blocks)
    scores = collect(recorder, shape, estimator=estimator, samples=len(blocks), tokens=tokens, fingerprint=fingerprint)
    return [scores[Criterion(*criterion)] for criterion in criteria]
