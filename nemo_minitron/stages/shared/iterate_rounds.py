"""The rounds of ``minitron iterate``, and those that are finished: their kept units, in a directory beside the output
until that exists.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.config import IterateConfig, TaylorConfig
from nemo_minitron.errors import CheckpointError
from nemo_minitron.runtime.progress import progress_bar
from nemo_minitron.shape import require_uniform
from nemo_minitron.stages.shared.measuring import live_model, open_measured
from nemo_minitron.stages.shared.target import target_sizes

if TYPE_CHECKING:
    from nemo_minitron.axes import KeptUnits
    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.data import Blocks
    from nemo_minitron.runtime.groups import Groups
    from nemo_minitron.shape import ModelShape

__all__ = ["Pruned", "Rounds", "prune_in_rounds", "round_shapes", "rounds_folder", "rounds_subject"]


@dataclass(frozen=True)
class Pruned:
    """What the rounds have come to.

    Attributes:
        checkpoint: the unpruned model.
        groups: of this process.
        shapes: after each round.
        kept: units of the unpruned model.
        saved: the finished rounds.
        resumed: number of rounds that were saved before.
    """

    checkpoint: Checkpoint
    groups: Groups
    shapes: list[ModelShape]
    kept: KeptUnits
    saved: Rounds
    resumed: int


def prune_in_rounds(config: IterateConfig, *, last: int | None = None) -> Pruned:
    """Score and choose by turns, from the last saved round on. Every rank runs this.

    Args:
        config: of the stage.
        last: the round to stop after; None for all.

    Raises:
        MinitronError: see :func:`run`.
    """
    from nemo_minitron.importance import fingerprint
    from nemo_minitron.pruning import choose_units, prune_weights

    measured = open_measured(config)
    checkpoint, groups, blocks = measured.checkpoint, measured.groups, measured.blocks
    shape = checkpoint.shape
    shapes = round_shapes(config, shape, target_sizes(config.target))
    saved = Rounds(rounds_folder(config), rounds_subject(config, fingerprint(checkpoint), blocks, shapes), groups)
    kept, done = saved.resume(shape)
    for number, target in enumerate(shapes[done:last], done + 1):
        now = checkpoint if kept is None else prune_weights(checkpoint, kept)
        scores = _score(config, now, blocks, groups, f"round {number} of {len(shapes)}")
        # Every rank has all scores, and chooses alike.
        chosen = choose_units(scores, now.shape, target, method=config.estimator)
        kept = chosen if kept is None else kept.compose(chosen)
        saved.add(number, kept, shape)
    assert kept is not None, "there is at least one round"
    return Pruned(checkpoint, groups, shapes, kept, saved, done)


def round_shapes(config: IterateConfig, shape: ModelShape, sizes: dict[str, int]) -> list[ModelShape]:
    """The shapes after each round; rounds that would change nothing are left out.

    Raises:
        ShapeError: if the target cannot be reached.
    """
    from nemo_minitron.pruning.choose import target_shape
    from nemo_minitron.pruning.rounds import intermediate_shapes

    require_uniform(shape, "pruning in rounds")
    layout = config.parallel
    return intermediate_shapes(
        shape,
        target_shape(shape, sizes),
        config.rounds,
        spacing=config.spacing,
        tensor=layout.tensor,
        pipeline=layout.pipeline_stages,
    )


def _score(config: IterateConfig, checkpoint: Checkpoint, blocks: Blocks, groups: Groups, label: str) -> Any:
    from nemo_minitron.importance import score_model

    chunks = live_model(config, checkpoint, groups)
    with progress_bar(label, len(blocks), shown=groups.is_main) as advance:
        return score_model(
            chunks,
            blocks,
            groups,
            shape=checkpoint.shape,
            micro_batch_size=config.micro_batch_size,
            sequence=config.aggregation.sequence,
            batch=config.aggregation.batch,
            estimator=config.estimator,
            loss=config.taylor.loss,
            progress=advance,
        )


def rounds_folder(config: IterateConfig) -> Path:
    """The directory of the rounds."""
    output = Path(config.output).absolute()
    return output.with_name(f".{output.name}.rounds")


def rounds_subject(config: IterateConfig, weights: str, blocks: Blocks, shapes: list[ModelShape]) -> str:
    """Everything that the rounds depend on, without the layout; rounds with other values are not used."""
    settings = {
        "weights": weights,
        "tokens": blocks.content(),
        "estimator": config.estimator,
        "aggregation": vars(config.aggregation),
        "shapes": [step.to_dict() for step in shapes],
        **({} if config.taylor == TaylorConfig() else {"taylor": vars(config.taylor)}),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


class Rounds:
    """The kept units after each finished round, in a directory beside the output until the output exists."""

    def __init__(self, folder: Path, subject: str, groups: Groups) -> None:
        self.folder = folder
        self.subject = subject
        self.groups = groups

    def resume(self, shape: ModelShape) -> tuple[KeptUnits | None, int]:
        """The units after the last finished round, and how many rounds are finished. Collective."""
        import torch.distributed as dist

        from nemo_minitron.pruning import load_kept

        kept, done = None, 0
        marker = self.folder / "subject"
        if marker.is_file() and marker.read_text() == self.subject:
            while (self.folder / f"round-{done + 1}.json").is_file():
                try:
                    kept, of = load_kept(self.folder / f"round-{done + 1}.json")
                except CheckpointError:
                    break
                assert of == shape, "the subject holds the weights' fingerprint"
                done += 1
        # Nobody writes before everybody has read.
        dist.barrier()
        if self.groups.is_main and not done:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            marker.write_text(self.subject)
        return kept, done

    def add(self, number: int, kept: KeptUnits, shape: ModelShape) -> None:
        """Save a round's result."""
        from nemo_minitron.pruning import save_kept

        if self.groups.is_main:
            save_kept(kept, shape, self.folder / f"round-{number}.json")

    def clear(self) -> None:
        """Remove the saved rounds: the output is written."""
        shutil.rmtree(self.folder, ignore_errors=True)
