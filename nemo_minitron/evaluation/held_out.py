"""Held-out loss: mean next-token cross-entropy of a live Megatron model, under any parallel layout.

The value is that of a plain language-modelling loss over the true vocabulary, as ``model(ids, labels=ids)`` of
transformers gives it: the padding rows that Megatron adds to the vocabulary take no part in the softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nemo_minitron.errors import DataError, NonFiniteError, ShapeError
from nemo_minitron.runtime.groups import Groups

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

__all__ = ["HeldOutLoss", "MeanLoss", "evaluating", "held_out_loss", "mask_padding"]

_PASSES_PER_REPORT = 8  # micro-batches between two calls of `progress`


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
    length = next(iter(domains.values())).shape[1] - 1
    if groups.layout.sequence_parallel and length % groups.layout.tensor:
        raise ShapeError(
            f"a sequence of {length} tokens cannot be split over parallel.tensor={groups.layout.tensor}; set "
            "data.sequence_length to a multiple of it, or parallel.sequence_parallel=false"
        )
    tokens = torch.cat(list(domains.values()))
    with evaluating(chunks), torch.no_grad():
        means = _block_losses(chunks, groups, tokens, micro_batch_size, vocab_size, progress)
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


@contextmanager
def evaluating(chunks: list[GPTModel]) -> Iterator[None]:
    """Dropout and the like off, for the time of the block."""
    were = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, training in zip(chunks, were, strict=True):
            chunk.train(training)


def _block_losses(
    chunks: list[GPTModel],
    groups: Groups,
    tokens: torch.Tensor,
    micro_batch_size: int,
    vocab_size: int,
    progress: Callable[[int], None] | None,
) -> torch.Tensor:
    """``[n, s + 1]`` tokens -> ``[n]`` float64 mean losses, on every rank."""
    layout = groups.layout
    # Every data-parallel rank runs equally many whole micro-batches, and the interleaved schedule wants a multiple of
    # the pipeline's length: repeat the last block to fill them, and drop what the repeats give.
    unit = micro_batch_size * (layout.pipeline if layout.virtual_pipeline else 1)
    per_rank = -(-len(tokens) // (unit * layout.data)) * unit
    index = torch.arange(per_rank * layout.data).clamp(max=len(tokens) - 1)
    mine = tokens[index.view(layout.data, per_rank)[groups.dp_rank]]

    losses = torch.zeros(per_rank, dtype=torch.float64)
    step = unit * _PASSES_PER_REPORT
    for start in range(0, per_rank, step):
        part = mine[start : start + step]
        found = _run_schedule(chunks, part.split(micro_batch_size), vocab_size)
        if groups.is_last_stage:
            losses[start : start + len(part)] = torch.cat(found).double().cpu()
        if progress is not None:
            progress(min(len(part) * layout.data, max(0, len(tokens) - start * layout.data)))
    # To a device that the backend can send from.
    device = next(chunks[0].parameters()).device
    losses = losses.to(device)
    dist.broadcast(losses, src=dist.get_global_rank(groups.pp, layout.pipeline - 1), group=groups.pp)
    everyone = [torch.empty_like(losses) for _ in range(layout.data)]
    dist.all_gather(everyone, losses, group=groups.dp)
    return torch.cat(everyone)[: len(tokens)].cpu()


def _run_schedule(chunks: list[GPTModel], batches: tuple[torch.Tensor, ...], vocab_size: int) -> list[torch.Tensor]:
    """``[b, s + 1]`` micro-batches -> ``[b]`` mean losses of each; empty except on the last pipeline stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    rows, width = batches[0].shape

    def forward_step(batch_iterator: Iterator[torch.Tensor], model: GPTModel) -> tuple[torch.Tensor, Any]:
        batch = next(batch_iterator).to(next(model.parameters()).device)
        inputs, labels = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        positions = torch.arange(width - 1, device=inputs.device).expand_as(inputs)
        # No mask: Megatron's attention is causal of itself.
        return model(inputs, positions, None), partial(_mean_losses, labels=labels, vocab_size=vocab_size)

    # Each chunk of an interleaved pipeline reads the micro-batches for itself.
    iterators = [iter(batches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=width - 1,
        micro_batch_size=rows,
        forward_only=True,
        collect_non_loss_data=True,
    )


def _mean_losses(
    logits: torch.Tensor, *, labels: torch.Tensor, vocab_size: int, non_loss_data: bool = True
) -> torch.Tensor:
    """``[b, s, V/tp]`` logits of this tensor-parallel rank and ``[b, s]`` labels -> ``[b]`` mean losses.

    The signature is the one of Megatron's ``collect_non_loss_data``.
    """
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return vocab_parallel_cross_entropy(mask_padding(logits.float(), vocab_size), labels).mean(dim=1)


def mask_padding(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Put the logits of padding rows, ``[..., V/tp]`` on this rank, beyond reach of softmax and argmax. In place."""
    from megatron.core import parallel_state

    first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
    logits[..., max(0, vocab_size - first) :] = torch.finfo(logits.dtype).min
    return logits
