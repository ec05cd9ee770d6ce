"""What a reconstruction gains on text that it did not see: held-out losses by source, before and after."""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemo_minitron.config import DataConfig, ReconstructConfig
from nemo_minitron.errors import DataError
from nemo_minitron.runtime.progress import progress_bar
from nemo_minitron.stages.shared.streaming import state_budget, streamed_model

if TYPE_CHECKING:
    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.data import Blocks
    from nemo_minitron.runtime.groups import Groups

__all__ = ["held_out_texts", "measure"]

logger = logging.getLogger(__name__)


def held_out_texts(config: ReconstructConfig, checkpoint: Checkpoint) -> dict[str, Blocks]:
    """The held-out blocks by the name of their source, those of ``outside`` too, cut with a model's tokenizer.

    Of text that has fewer blocks fewer are measured. Data without any is no fault: a warning says that nothing is
    measured on it.

    Raises:
        MinitronError: for text that cannot be used; for a source of ``outside`` with the name of another.
    """
    if not config.held_out_samples:
        return {}
    names = [source.name for source in config.data.all_sources()]
    if same := [source.name for source in config.outside if source.name in names]:
        raise DataError(f"outside: {same[0]!r} is the name of a source of data too; give it another name")
    try:
        texts = _blocks(config, config.data, checkpoint)
    except DataError as error:
        logger.warning("the losses before and after are not measured: %s", error)
        texts = {}
    if config.outside:
        texts |= _blocks(config, dataclasses.replace(config.data, sources=config.outside), checkpoint)
    return texts


def _blocks(config: ReconstructConfig, data: DataConfig, checkpoint: Checkpoint) -> dict[str, Blocks]:
    from nemo_minitron.data import build_domain_blocks

    count = config.held_out_samples
    while True:
        try:
            return build_domain_blocks(
                data,
                checkpoint.tokenizer,
                "held_out",
                blocks=count,
                vocab_size=checkpoint.shape.vocab_size,
                max_length=checkpoint.architecture.max_position_embeddings,
            )
        except DataError:
            if count == 1:
                raise
            count //= 2


def measure(
    config: ReconstructConfig, groups: Groups, models: Mapping[str, Checkpoint], texts: Mapping[str, Blocks]
) -> dict[str, Any]:
    """The held-out loss of each model, streamed. Collective.

    Returns:
        ``{source: {"blocks", "outside", model: nats per token, ...}}``; a source of which calibration saw nothing is
        ``outside``.

    Raises:
        NonFiniteError: if a loss is NaN or infinite.
    """
    if not texts:
        return {}
    outside = {source.name for source in config.outside}
    losses: dict[str, Any] = {
        name: {"blocks": len(blocks), "outside": name in outside} for name, blocks in texts.items()
    }
    for model, checkpoint in models.items():
        from nemo_minitron.evaluation import streamed_loss

        with progress_bar(f"measuring {model}", checkpoint.shape.num_layers + 1, shown=groups.is_main) as advance:
            found = streamed_loss(
                streamed_model(config, checkpoint, groups),
                texts,
                config.micro_batch_size,
                budget=state_budget(config),
                progress=advance,
            )
        for name, mean in found.domains.items():
            losses[name][model] = round(mean.loss, 6)
        gc.collect()
    for name, values in losses.items():
        where = ", which calibration did not see" if values["outside"] else ""
        logger.info(
            "held-out loss on %s%s: teacher %.3f, pruned %.3f, reconstructed %.3f",
            name, where, values["teacher"], values["pruned"], values["reconstructed"],
        )  # fmt: skip
        if values["reconstructed"] > values["pruned"]:
            logger.warning(
                "%s: the reconstructed model is worse than the pruned one (%.3f, %.3f); calibrate on such text too, or "
                "raise samples",
                name, values["reconstructed"], values["pruned"],
            )  # fmt: skip
    return losses
