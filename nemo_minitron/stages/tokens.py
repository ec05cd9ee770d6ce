"""``minitron tokens``: how often each token occurs in a text, for trimming the vocabulary."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.tokenizer.trimming import FREQUENCIES
from nemo_minitron.config import TokensConfig
from nemo_minitron.errors import CheckpointError
from nemo_minitron.jobs.atomic import stage_output
from nemo_minitron.jobs.plans import PlannedPath, StagePlan

__all__ = ["plan", "run"]

logger = logging.getLogger(__name__)


def plan(config: TokensConfig) -> StagePlan:
    """What :func:`run` would read and write."""
    from nemo_minitron.data.inputs import data_inputs

    data = data_inputs(config.data)
    size = f"{config.blocks * config.data.sequence_length:,} tokens" if config.blocks else "all tokens"
    return StagePlan(
        "tokens",
        reads=[PlannedPath(config.model, "tokenizer"), *(PlannedPath(path, what) for path, what in data.files)],
        writes=[PlannedPath(str(Path(config.output) / FREQUENCIES), "token frequencies")],
        costs={"counted": f"{size} of the {config.split} split"},
        notes=data.notes,
        faults=data.faults,
    )


def run(config: TokensConfig) -> dict[str, Any]:
    """Count, and write ``frequencies.tsv``.

    Returns:
        ``tokens, distinct, vocab_size, coverage`` (share of the text that the most frequent quarter and half of the
        vocabulary make up).

    Raises:
        MinitronError: for a tokenizer or text that cannot be used.
    """
    import torch

    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.checkpoints.tokenizer.trimming import tokenizer_fingerprint, write_frequencies
    from nemo_minitron.data import build_blocks

    checkpoint = open_checkpoint(config.model)
    if checkpoint.tokenizer is None:
        raise CheckpointError(
            f"{config.model}: carries no tokenizer to count with; import the model with its tokenizer"
        )
    tokenizer_fingerprint(checkpoint.tokenizer)  # refuses at once what could not be trimmed afterwards
    size = checkpoint.shape.vocab_size
    blocks = build_blocks(
        config.data, checkpoint.tokenizer, config.split, blocks=config.blocks, vocab_size=checkpoint.shape.vocab_size
    )
    # The last token of a block is the next one's first.
    counts = torch.bincount(blocks.text(), minlength=size)
    total = int(counts.sum())
    with stage_output(config.output, config.overwrite) as output:
        sources = ", ".join(source.name for source in config.data.all_sources())
        write_frequencies(
            counts.tolist(),
            output / FREQUENCIES,
            tokenizer=checkpoint.tokenizer,
            comment=f"token id, count; {total} tokens of {sources} ({config.split})",
        )
    ordered = counts.sort(descending=True).values.cumsum(0)
    coverage = {f"{share:.0%}": round(int(ordered[int(size * share) - 1]) / total, 6) for share in (0.25, 0.5)}
    logger.info("%s tokens, %d of %d distinct", f"{total:,}", int((counts > 0).sum()), size)
    return {"tokens": total, "distinct": int((counts > 0).sum()), "vocab_size": size, "coverage": coverage}
