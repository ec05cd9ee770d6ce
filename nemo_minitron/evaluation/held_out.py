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

from nemo_minitron.errors import DataError, NonFiniteError
from nemo_minitron.runtime.forward import block_losses
from nemo_minitron.runtime.groups import Groups

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

__all__ = ["HeldOutLoss", "MeanLoss", "held_out_loss"]


@dataclass(frozen=True)
class MeanLoss:
    """A mean over tokens.

    Attributes:
        loss: nats per token.
        standard_error: of ``loss``, from the spread of the block means; NaN for a single block.
        tokens: predicted tokens.
        blocks: blocks they came in.
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
    """Loss over everything, and by domain.

    Attributes:
        overall: all tokens weigh the same.
        domains: by source.
    """

    overall: MeanLoss
    domains: dict[str, MeanLoss] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.overall.to_dict(), "domains": {name: mean.to_dict() for name, mean in self.domains.items()}}


def held_out_loss(
    chunks: list[GPTModel],
    groups: Groups,
    blocks: torch.Tensor | Mapping[str, torch.Tensor],
    micro_batch_size: int,
    *,
    vocab_size: int,
    progress: Callable[[int], None] | None = None,
) -> HeldOutLoss:
    """Mean next-token cross-entropy per token. To be called on every rank; every rank gets the result.

    Runs Megatron's own forward schedule (``megatron.core.pipeline_parallel.get_forward_backward_func``) without
    gradients. Memory beyond the model: the activations of one layer and some three fp32 tensors
    ``[micro_batch_size, s, V/tp]``.

    Args:
        chunks: this rank's part of the model, as ``runtime.model.build_model`` gives it, with weights loaded.
        groups: of this process; data-parallel ranks share the blocks out.
        blocks: ``[n, s + 1]`` int64, the same on every rank, or such tensors by domain.
        micro_batch_size: blocks of one forward pass.
        vocab_size: true vocabulary; logits beyond it are padding.
        progress: called with the number of blocks done since its last call.

    Returns:
        The loss over all blocks, and by domain where ``blocks`` is a mapping.

    Raises:
        DataError: for no blocks.
        ShapeError: if sequence parallelism does not divide the sequence.
        NonFiniteError: if any block's loss is NaN or infinite.
    """
    domains = dict(blocks) if isinstance(blocks, Mapping) else {"": blocks}
    if not domains or any(len(tensor) == 0 for tensor in domains.values()):
        empty = [name for name, tensor in domains.items() if len(tensor) == 0]
        raise DataError(f"held-out loss needs at least one block{f' of {empty[0]!r}' if empty else ''}; none was given")
    tokens = torch.cat(list(domains.values()))
    length = tokens.shape[1] - 1
    means = block_losses(chunks, groups, tokens, micro_batch_size, vocab_size=vocab_size, progress=progress)
    if not bool(torch.isfinite(means).all()):
        bad = int((~torch.isfinite(means)).sum())
        raise NonFiniteError(
            f"the held-out loss of {bad} of {len(means)} blocks is NaN or infinite; check the checkpoint's weights, "
            "or evaluate in runtime.dtype=float32"
        )
    parts = means.split([len(tensor) for tensor in domains.values()])
    by_domain = {name: _mean(part, length) for name, part in zip(domains, parts, strict=True)}
    return HeldOutLoss(_mean(means, length), by_domain if isinstance(blocks, Mapping) else {})


def _mean(means: torch.Tensor, length: int) -> MeanLoss:
    """``[n]`` float64 block means of ``length`` tokens each -> their mean."""
    n = len(means)
    error = float(means.std(correction=1)) / math.sqrt(n) if n > 1 else math.nan
    return MeanLoss(float(means.mean()), error, n * length, n)
