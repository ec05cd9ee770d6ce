"""Losses of token blocks by forward passes of a live Megatron model, under any parallel layout.

Evaluation and importance both use it. A loss is that of plain language modelling over the true vocabulary,
as ``model(ids, labels=ids)`` of transformers gives it: the padding rows that Megatron adds to the vocabulary take no
part in the softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nemo_minitron.errors import ShapeError
from nemo_minitron.runtime.groups import Groups
from nemo_minitron.runtime.masks import attention_mask, document_positions, documents_masked

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

__all__ = ["block_losses", "document_inputs", "evaluating", "mask_padding", "mean_losses"]

_PASSES_PER_REPORT = 8  # micro-batches between two calls of `progress`


@contextmanager
def evaluating(chunks: list[GPTModel]) -> Iterator[None]:
    """Within the block the model is in evaluation mode: without dropout."""
    were = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, training in zip(chunks, were, strict=True):
            chunk.train(training)


@torch.no_grad()
def block_losses(
    chunks: list[GPTModel],
    groups: Groups,
    blocks: torch.Tensor,
    micro_batch_size: int,
    *,
    vocab_size: int,
    counted: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Mean next-token cross-entropy of each block. Every rank calls it, and every rank gets the losses of all blocks.

    Runs Megatron's own forward schedule (``megatron.core.pipeline_parallel.get_forward_backward_func``) without
    gradients. Memory beyond the model: the activations of one layer and some three fp32 tensors
    ``[micro_batch_size, s, V/tp]``.

    Args:
        chunks: this rank's part of the model, as ``runtime.model.build_model`` gives it, with weights loaded.
        groups: of this process; data-parallel ranks share the blocks out.
        blocks: ``[n, s + 1]`` int64, n > 0, the same on every rank. Attention is causal, so whatever fills a block up
            at its end changes nothing before it.
        micro_batch_size: blocks of one forward pass.
        vocab_size: true vocabulary; logits beyond it are padding.
        counted: ``[n, s]`` bool, the labels (tokens 1 to s of a block) that count, at least one a block; None counts
            all.
        segments: ``[n, s + 1]``, the documents of the tokens (:mod:`nemo_minitron.runtime.masks`): attention stays
            within each document, at the cost of a mask ``[micro_batch_size, 1, s, s]``. Only ``counted`` says which
            labels count. None where each block is one text.
        progress: called with the number of blocks done since its last call.

    Returns:
        ``[n]`` float64 nats per counted token, on the CPU; they may be NaN or infinite.

    Raises:
        ShapeError: if sequence parallelism does not divide the sequence.
    """
    layout, length = groups.layout, blocks.shape[1] - 1
    if layout.sequence_parallel and length % layout.tensor:
        raise ShapeError(
            f"a sequence of {length} tokens cannot be split over parallel.tensor={layout.tensor}; set "
            "data.sequence_length to a multiple of it, or parallel.sequence_parallel=false"
        )
    if counted is None:
        counted = torch.ones(len(blocks), length, dtype=torch.bool)
    # Every data-parallel rank runs equally many whole micro-batches, and the interleaved schedule wants a multiple of
    # the pipeline's length: repeat the last block to fill them, and drop what the repeats give.
    unit = micro_batch_size * (layout.pipeline if layout.virtual_pipeline else 1)
    per_rank = -(-len(blocks) // (unit * layout.data)) * unit
    index = torch.arange(per_rank * layout.data).clamp(max=len(blocks) - 1)
    mine = index.view(layout.data, per_rank)[groups.dp_rank]

    losses = torch.zeros(per_rank, dtype=torch.float64)
    step = unit * _PASSES_PER_REPORT
    with evaluating(chunks), documents_masked(chunks, segments is not None):
        for start in range(0, per_rank, step):
            part = mine[start : start + step]
            batches = [
                (blocks[some], counted[some], None if segments is None else segments[some, :-1])
                for some in part.split(micro_batch_size)
            ]
            outputs = _run_schedule(chunks, batches, vocab_size)
            if groups.is_last_stage:
                losses[start : start + len(part)] = torch.cat(outputs).cpu()
            if progress is not None:
                progress(min(len(part) * layout.data, max(0, len(blocks) - start * layout.data)))
    # To a device that the backend can send from.
    device = next(chunks[0].parameters()).device
    losses = losses.to(device)
    dist.broadcast(losses, src=dist.get_global_rank(groups.pp, layout.pipeline - 1), group=groups.pp)
    everyone = [torch.empty_like(losses) for _ in range(layout.data)]
    dist.all_gather(everyone, losses, group=groups.dp)
    return torch.cat(everyone)[: len(blocks)].cpu()


def _run_schedule(
    chunks: list[GPTModel], batches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]], vocab_size: int
) -> list[torch.Tensor]:
    """Mean losses ``[b]`` of each micro-batch; an empty list except on the last stage.

    Args:
        chunks: of this rank.
        batches: tokens ``[b, s + 1]``, counted labels ``[b, s]`` and segments ``[b, s]`` or None.
        vocab_size: true vocabulary.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    rows, width = batches[0][0].shape

    def forward_step(
        iterator: Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]], model: GPTModel
    ) -> tuple[torch.Tensor, Any]:
        device = next(model.parameters()).device
        tokens, counts, segments = next(iterator)
        batch, counted = tokens.to(device), counts.to(device)
        inputs, labels = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        positions, mask = document_inputs(inputs, segments)
        return model(inputs, positions, mask), partial(
            mean_losses, labels=labels, counted=counted, vocab_size=vocab_size
        )

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


def document_inputs(inputs: torch.Tensor, segments: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Positions and attention mask of a micro-batch ``[b, s]``, on its device.

    There is no mask without segments: Megatron's attention is causal by itself.
    """
    if segments is None:
        return torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs), None
    segments = segments.to(inputs.device)
    return document_positions(segments), attention_mask(segments)


def mean_losses(
    logits: torch.Tensor, *, labels: torch.Tensor, counted: torch.Tensor, vocab_size: int, non_loss_data: bool = True
) -> torch.Tensor:
    """``[b, s, V/tp]`` logits of this tensor-parallel rank, ``[b, s]`` labels -> ``[b]`` float64 mean losses.

    The signature is the one of Megatron's ``collect_non_loss_data``.
    """
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    losses = vocab_parallel_cross_entropy(mask_padding(logits.float(), vocab_size), labels).double()
    # Not a product: what lies outside may be infinite.
    return losses.where(counted, 0.0).sum(dim=1) / counted.sum(dim=1)


def mask_padding(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Set the logits of padding rows, in ``[..., V/tp]`` of this rank, to the dtype's lowest number, in place."""
    from megatron.core import parallel_state

    first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
    logits[..., max(0, vocab_size - first) :] = torch.finfo(logits.dtype).min
    return logits
