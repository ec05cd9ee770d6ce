"""Which units a pruning keeps, by its configuration, for ``prune`` and ``search``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_minitron.config import PruneConfig
from nemo_minitron.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from nemo_minitron.axes import KeptUnits
    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.importance import Scores
    from nemo_minitron.shape import ModelShape

__all__ = ["kept_units", "read_scores"]


def kept_units(config: PruneConfig, checkpoint: Checkpoint, target: ModelShape, scores: Scores | None) -> KeptUnits:
    """The units that stay under a configuration.

    Args:
        config: how the units are chosen.
        checkpoint: unpruned.
        target: shape of the pruned model.
        scores: from :func:`read_scores`.

    Raises:
        MinitronError: for depth scores or frequencies that cannot be used, or a target that cannot be reached.
    """
    from nemo_minitron.pruning import choose_units

    return choose_units(
        scores,
        checkpoint.shape,
        target,
        method=config.method,
        seed=config.runtime.seed,
        layers_to_drop=_layers_to_drop(config, checkpoint, target.num_layers, scores),
        vocab=_vocabulary(config, checkpoint),
    )


def read_scores(config: PruneConfig, checkpoint: Checkpoint) -> Scores | None:
    """The scores, if the method uses them; they must belong to this checkpoint."""
    from nemo_minitron.importance import Scores, fingerprint

    if config.method == "random" or config.scores is None:
        return None
    scores = Scores.load(config.scores)
    scores.check(checkpoint.shape, fingerprint(checkpoint), where=config.scores)
    if scores.estimator != config.method:
        raise ConfigError(
            f"method={config.method}: {config.scores} holds scores of the estimator {scores.estimator}; set "
            f"method={scores.estimator}, or score with estimator={config.method}"
        )
    return scores


def _layers_to_drop(
    config: PruneConfig, checkpoint: Checkpoint, num_layers: int, scores: Scores | None
) -> Sequence[int] | None:
    """The layers that the configuration names or the depth criterion chooses; None leaves them to the method."""
    from nemo_minitron.importance import DepthScores, fingerprint
    from nemo_minitron.pruning.depth import choose_layers, influence_costs

    before = checkpoint.shape.num_layers
    if config.layers_to_drop is not None or config.method == "random" or num_layers == before:
        return config.layers_to_drop
    if config.depth_scores is not None:
        measured = DepthScores.load(config.depth_scores)
        measured.check(checkpoint.shape, fingerprint(checkpoint), where=config.depth_scores)
        costs = measured.costs(config.depth.criterion)
    elif scores is not None:
        costs = influence_costs(scores.layers.tolist())
    else:
        return None
    kept = choose_layers(costs, before, before - num_layers, config.depth.form)
    return [layer for layer in range(before) if layer not in kept]


def _vocabulary(config: PruneConfig, checkpoint: Checkpoint) -> tuple[int, ...] | None:
    """The token ids that stay; None keeps all."""
    from nemo_minitron.checkpoints.tokenizer.trimming import choose_vocabulary, frequencies_path, read_frequencies

    if config.vocabulary.size is None or config.vocabulary.frequencies is None:
        return None
    if checkpoint.tokenizer is None:
        raise CheckpointError(f"{config.model}: carries no tokenizer, which would have to follow the vocabulary")
    constants = checkpoint.architecture
    named = [constants.bos_token_id, constants.pad_token_id, *constants.end_tokens]
    named += [value for key, value in constants.generation.items() if key.endswith("_token_id")]
    special = [token for token in named if isinstance(token, int)]
    return choose_vocabulary(
        checkpoint.tokenizer,
        read_frequencies(frequencies_path(config.vocabulary.frequencies)),
        config.vocabulary.size,
        vocab_size=checkpoint.shape.vocab_size,
        special=special,
    )
