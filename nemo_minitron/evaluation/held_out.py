"""Held-out loss: mean next-token cross-entropy of a live Megatron model, under any parallel layout.

The value is that of a plain language-modelling loss over the true vocabulary, as ``model(ids, labels=ids)`` of
transformers gives it: the padding rows that Megatron adds to the vocabulary take no part in the softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from nemo_minitron.data.blocks import Blocks
from nemo_minitron.errors import DataError, NonFiniteError
from nemo_minitron.runtime.forward import block_losses
from nemo_minitron.runtime.groups import Groups

if TYPE_CHECKING:
    from pathlib import Path

    from megatron.core.models.gpt import GPTModel

    from nemo_minitron.streamed import StreamedModel

__all__ = ["HeldOutLoss", "MeanLoss", "held_out_loss", "streamed_loss"]


@dataclass(frozen=True)
class MeanLoss:
    """A mean over tokens.

    Attributes:
        loss: nats per token.
        standard_error: of ``loss``, from the spread of the block means; NaN for a single block.
        tokens: predicted tokens.
        blocks: number of blocks with these tokens.
    """

    loss: float
    standard_error: float
    tokens: int
    blocks: int

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has neither NaN nor infinity: an unknown standard error or overflown perplexity is null."""
        values = {**asdict(self), "perplexity": self.perplexity}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss over all tokens, and by domain.

    Attributes:
        overall: over all tokens, each with the same weight.
        domains: by the name of the source.
    """

    overall: MeanLoss
    domains: dict[str, MeanLoss] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.overall.to_dict(), "domains": {name: mean.to_dict() for name, mean in self.domains.items()}}


def held_out_loss(
    chunks: list[GPTModel],
    groups: Groups,
    blocks: torch.Tensor | Blocks | Mapping[str, torch.Tensor] | Mapping[str, Blocks],
    micro_batch_size: int,
    *,
    vocab_size: int,
    progress: Callable[[int], None] | None = None,
) -> HeldOutLoss:
    """Mean next-token cross-entropy per token. Collective; every rank gets the result.

    Runs Megatron's own forward schedule (``megatron.core.pipeline_parallel.get_forward_backward_func``) without
    gradients. Memory beyond the model: the activations of one layer and some three fp32 tensors
    ``[micro_batch_size, s, V/tp]``.

    Args:
        chunks: this rank's part of the model, as ``runtime.model.build_model`` gives it, with weights loaded.
        groups: of this process; the blocks are divided among data-parallel ranks.
        blocks: ``[n, s + 1]`` int64, the same on every rank, or a mapping from domains to such blocks. If they say
            which documents they hold and which labels count, attention stays within each document and the loss is over
            those labels.
        micro_batch_size: blocks of one forward pass.
        vocab_size: true vocabulary; logits beyond it are padding.
        progress: called with the number of blocks done since its last call.

    Returns:
        The loss over all blocks, and by domain where ``blocks`` is a mapping.

    Raises:
        DataError: for no blocks, or a block in which no label counts.
        ShapeError: if sequence parallelism does not divide the sequence.
        NonFiniteError: if any block's loss is NaN or infinite.
    """
    domains, whole = _held_out_blocks(blocks)
    means = block_losses(
        chunks,
        groups,
        whole.tokens,
        micro_batch_size,
        vocab_size=vocab_size,
        counted=whole.counted(),
        segments=whole.segments,
        progress=progress,
    )
    return _by_domain(means, domains, whole, named=isinstance(blocks, Mapping))


def streamed_loss(
    model: StreamedModel,
    blocks: torch.Tensor | Blocks | Mapping[str, torch.Tensor] | Mapping[str, Blocks],
    micro_batch_size: int,
    *,
    budget: float = float("inf"),
    spill: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> HeldOutLoss:
    """:func:`held_out_loss` of a model whose layers are in memory one at a time. Collective.

    Args:
        model: its layout has data parallelism alone.
        blocks, micro_batch_size: as of :func:`held_out_loss`.
        budget: bytes of hidden states that a rank keeps in memory.
        spill: file for a rank's states beyond that.
        progress: called with 1 for each layer, and for the output layer.

    Raises:
        MinitronError: as of :func:`held_out_loss`; the first layer whose output is not finite is named.
    """
    from nemo_minitron.streamed import Pass

    domains, whole = _held_out_blocks(blocks)
    run = Pass(model, whole, micro_batch_size, budget=budget, file=spill)
    run.embed()
    for layer in range(model.shape.num_layers):
        run.through(model.layer(layer))
        run.check_finite(layer)
        if progress is not None:
            progress(1)
    model.release()
    means = run.losses()
    if progress is not None:
        progress(1)
    return _by_domain(means, domains, whole, named=isinstance(blocks, Mapping))


def _held_out_blocks(
    blocks: torch.Tensor | Blocks | Mapping[str, torch.Tensor] | Mapping[str, Blocks],
) -> tuple[dict[str, Blocks], Blocks]:
    """The blocks by domain, and all of them; a loss can be taken of each."""
    given = blocks if isinstance(blocks, Mapping) else {"": blocks}
    domains = {name: Blocks.of(part) for name, part in given.items()}
    if not domains or any(len(part) == 0 for part in domains.values()):
        empty = [name for name, part in domains.items() if len(part) == 0]
        raise DataError(f"held-out loss needs at least one block{f' of {empty[0]!r}' if empty else ''}; none was given")
    for name, part in domains.items():
        part.check_labels(f"held-out data {name!r}" if name else "held-out data")
    return domains, Blocks.cat(list(domains.values()))


def _by_domain(means: torch.Tensor, domains: dict[str, Blocks], whole: Blocks, *, named: bool) -> HeldOutLoss:
    """``[n]`` losses of all blocks -> their means, in all and, where domains have names, of each.

    Raises:
        NonFiniteError: if any is NaN or infinite.
    """
    if not bool(torch.isfinite(means).all()):
        bad = int((~torch.isfinite(means)).sum())
        raise NonFiniteError(
            f"the held-out loss of {bad} of {len(means)} blocks is NaN or infinite; check the checkpoint's weights, "
            "or evaluate in runtime.dtype=float32"
        )
    counted = whole.counted()
    counts = torch.full((len(whole),), whole.sequence_length) if counted is None else counted.sum(dim=1)
    sizes = [len(part) for part in domains.values()]
    by_domain = {
        name: _mean(*part) for name, *part in zip(domains, means.split(sizes), counts.split(sizes), strict=True)
    }
    return HeldOutLoss(_mean(means, counts), by_domain if named else {})


def _mean(means: torch.Tensor, counts: torch.Tensor) -> MeanLoss:
    """``[n]`` float64 block means over ``[n]`` tokens each -> their mean over tokens.

    The standard error is that of a ratio of sums over blocks; for blocks of equal length it is that of their mean.
    """
    n, tokens = len(means), int(counts.sum())
    if bool((counts == counts[0]).all()):
        error = float(means.std(correction=1)) / math.sqrt(n) if n > 1 else math.nan
        return MeanLoss(float(means.mean()), error, tokens, n)
    mean = float((means * counts).sum()) / tokens
    spread = float(((means - mean) * counts).square().sum())
    return MeanLoss(mean, math.sqrt(spread * n / (n - 1)) / tokens if n > 1 else math.nan, tokens, n)
