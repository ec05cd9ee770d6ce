"""Score a live Megatron model over calibration blocks, under any parallel layout."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nemo_minitron.data.blocks import Blocks
from nemo_minitron.errors import ConfigError, DataError, ShapeError
from nemo_minitron.importance.aggregation import Criterion, gathered
from nemo_minitron.importance.estimators import ESTIMATORS
from nemo_minitron.importance.hooks import Key, Recorder
from nemo_minitron.importance.scores import Scores
from nemo_minitron.importance.taylor import TAYLOR_LOSSES, differentiable, label_draws, own_labels, sample_losses
from nemo_minitron.runtime.forward import document_inputs
from nemo_minitron.runtime.groups import Groups
from nemo_minitron.runtime.masks import FILLING, documents_masked
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

__all__ = ["calibration_blocks", "collect", "make_recorder", "score_criteria", "score_model"]

_PASSES_PER_CHECK = 8  # micro-batches between two looks for non-finite values


def score_model(
    chunks: list[GPTModel],
    blocks: torch.Tensor | Blocks,
    groups: Groups,
    *,
    shape: ModelShape,
    micro_batch_size: int = 1,
    sequence: str | None = None,
    batch: str = "l2",
    estimator: str = "activation",
    fingerprint: str | None = None,
    loss: str = "labels",
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Score every unit by one criterion; see :func:`score_criteria` for the other arguments.

    Args:
        sequence: aggregation over the tokens of a sample; by default the mean of activations, as the paper found best,
            and the sum that the Taylor estimator always takes.
        batch: aggregation over samples, for estimators that have the choice.
    """
    known = ESTIMATORS.get(estimator)
    criterion = Criterion(sequence or "mean", batch) if known is None else known.criterion(sequence, batch)
    (scores,) = score_criteria(
        chunks,
        blocks,
        groups,
        criteria=[criterion],
        shape=shape,
        micro_batch_size=micro_batch_size,
        estimator=estimator,
        fingerprint=fingerprint,
        loss=loss,
        progress=progress,
    )
    return scores


def score_criteria(
    chunks: list[GPTModel],
    blocks: torch.Tensor | Blocks,
    groups: Groups,
    *,
    criteria: Sequence[tuple[str, str]],
    shape: ModelShape,
    micro_batch_size: int = 1,
    estimator: str = "activation",
    fingerprint: str | None = None,
    loss: str = "labels",
    progress: Callable[[int], None] | None = None,
) -> list[Scores]:
    """Score every unit by any number of criteria in one pass over the data.

    Every rank calls it, and every rank gets all scores.

    Estimator "activation" (arXiv 2407.14679, section 2.2), forward passes alone. With ``a`` the activations of a unit
    that :mod:`~nemo_minitron.importance.hooks` reads:

    - FFN neurons, hidden channels, heads, experts: ``batch over samples (sequence over tokens (a))``; by default
      ``sqrt(sum_b (1/s sum_t |a|)^2)``. Hidden channels add up over the two normalisations of every layer.
    - query groups: the L2 norm of their heads' scores.
    - layers: block influence ``1 - E[cos(x_in, x_out)]`` over all tokens, whatever the criterion.

    Estimator "reconstruction" (:mod:`~nemo_minitron.importance.reconstruction`), forward passes alone: the loss of what
    reads the units after the units that stay have made up for those that go, over all tokens. Its one criterion is
    ``("none", "none")``.

    Estimator "taylor" (:mod:`~nemo_minitron.importance.taylor`), forward and backward: ``batch over samples (|sum over
    tokens (a * dL/da)|)`` for the same activations, summed over the channels of a head; of layers, ``dL/dx_out *
    (x_out - x_in)``. With ``loss`` "kl" the labels are drawn from the model's own distribution.

    The schedule is Megatron's own (``get_forward_backward_func``), so pipelines and virtual stages work. Passes without
    gradients end before the output layer, since no logits are needed. Memory beyond the model: the activations of one
    layer (of "taylor": those of a training step, without parameter gradients), and O(units x criteria) statistics.

    Args:
        chunks: this rank's part of the model, as ``runtime.model.build_model`` gives it, with weights loaded.
        blocks: ``[n, s + 1]`` int64 tokens, the same on every rank; data-parallel ranks share them out. The last token
            of a block is only a label. Where blocks say which documents they hold, attention stays within each. All
            tokens count as activations; in the loss of "taylor", the labels that count.
        groups: of this process.
        criteria: pairs of aggregations over sequence and batch, by their names in
            :data:`~nemo_minitron.importance.aggregation.AGGREGATIONS`; for "taylor" the first is "sum".
        shape: of the whole model.
        micro_batch_size: blocks of one forward pass.
        estimator: one of :data:`~nemo_minitron.importance.estimators.ESTIMATORS` that runs the model.
        fingerprint: of the weights (:func:`~nemo_minitron.importance.scores.fingerprint`), kept with the scores.
        loss: of "taylor": "labels", or "kl" to the unpruned model's own distribution.
        progress: called with the number of blocks done since its last call.

    Returns:
        Scores for each criterion, in order.

    Raises:
        DataError: for no calibration blocks, blocks that are filled up, or one in which no label counts.
        ShapeError: if sequence parallelism does not divide the sequence, or a layer cannot be scored.
        NonFiniteError: if an activation or gradient is NaN or infinite, naming layer and module.
        ConfigError: for an estimator, aggregation or loss that is not known, or no criteria.
    """
    if loss not in TAYLOR_LOSSES:
        raise ConfigError(f"taylor.loss={loss!r}: must be one of {', '.join(TAYLOR_LOSSES)}")
    recorder = make_recorder(chunks, groups, criteria, estimator)
    blocks = calibration_blocks(blocks, groups)
    gradients = ESTIMATORS[estimator].gradients
    with ExitStack() as stack:
        stack.enter_context(differentiable(chunks) if gradients else torch.no_grad())
        stack.enter_context(_prepared(chunks, logits=gradients))
        stack.enter_context(recorder.attached())
        stack.enter_context(documents_masked(chunks, blocks.segments is not None))
        draws = label_draws(blocks) if gradients and loss == "kl" else None
        _run(recorder, blocks, micro_batch_size, shape.vocab_size, progress, draws, gradients=gradients)
    recorder.finish()
    tokens = blocks.sequence_length * len(blocks)
    scores = collect(recorder, shape, estimator=estimator, samples=len(blocks), tokens=tokens, fingerprint=fingerprint)
    taken = loss if gradients else None
    return [dataclasses.replace(scores[Criterion(*criterion)], loss=taken) for criterion in criteria]


def make_recorder(
    chunks: list[GPTModel], groups: Groups, criteria: Sequence[tuple[str, str]], estimator: str
) -> Recorder:
    """The recorder of an estimator that runs the model; arguments as of :func:`score_criteria`.

    Raises:
        ConfigError: for an estimator or aggregation that is not known, or no criteria.
    """
    pairs = [Criterion(*criterion) for criterion in criteria]
    if not pairs:
        raise ConfigError("criteria: none is given; give at least one pair of aggregations, as ('mean', 'l2')")
    entry = ESTIMATORS.get(estimator)
    if entry is None or entry.recorder is None:
        able = [known.name for known in ESTIMATORS.values() if known.runs_model]
        raise ConfigError(f"estimator={estimator!r}: must be one of {', '.join(able)}")
    faults = [entry.sequence_fault(pair.sequence) or entry.batch_fault(pair.batch) for pair in pairs]
    if faults := list(filter(None, faults)):
        raise ConfigError(faults)
    return entry.recorder(chunks, groups, pairs)


def calibration_blocks(blocks: torch.Tensor | Blocks, groups: Groups) -> Blocks:
    """The blocks, if a model can be scored on them.

    Raises:
        DataError: for no blocks, blocks that are filled up, or one in which no label counts.
        ShapeError: if sequence parallelism does not divide the sequence.
    """
    if len(blocks.shape) != 2 or len(blocks) == 0 or blocks.shape[1] < 2:
        raise DataError(
            f"calibration data is empty (blocks of shape {list(blocks.shape)}); give at least one block of two tokens"
        )
    blocks = Blocks.of(blocks)
    blocks.check_labels("calibration data")
    if blocks.segments is not None and bool((blocks.segments[:, :-1] == FILLING).any()):
        raise DataError(
            "calibration blocks are filled up, and what fills them would count as text; pack them with packing=stream"
        )
    length = blocks.sequence_length
    if groups.layout.sequence_parallel and length % groups.layout.tensor:
        raise ShapeError(
            f"a sequence of {length} tokens cannot be split over parallel.tensor={groups.layout.tensor}; set "
            "data.sequence_length to a multiple of it, or parallel.sequence_parallel=false"
        )
    return blocks


@contextmanager
def _prepared(chunks: list[GPTModel], *, logits: bool) -> Iterator[None]:
    """Switch dropout off; without logits, end the pass after the last layer (``post_process`` of ``GPTModel``)."""
    were = [(chunk.training, chunk.post_process) for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
        chunk.post_process = chunk.post_process and logits
    try:
        yield
    finally:
        for chunk, (training, post_process) in zip(chunks, were, strict=True):
            chunk.train(training)
            chunk.post_process = post_process


def _run(
    recorder: Recorder,
    blocks: Blocks,
    micro_batch_size: int,
    vocab_size: int,
    progress: Callable[[int], None] | None,
    draws: torch.Tensor | None,
    *,
    gradients: bool,
) -> None:
    layout = recorder.groups.layout
    mine = blocks[recorder.groups.dp_rank :: layout.data]
    if draws is not None:
        draws = draws[recorder.groups.dp_rank :: layout.data]
    # Equally many passes on every data-parallel rank, whose checks are collective; the interleaved schedule wants a
    # multiple of the pipeline's length.
    unit = micro_batch_size * (layout.pipeline if layout.virtual_pipeline else 1)
    step = unit * _PASSES_PER_CHECK
    longest = -(-len(blocks) // layout.data)
    for start in range(0, longest, step):
        part = mine[start : start + step]
        passes = -(-min(step, longest - start) // unit) * unit // micro_batch_size
        drawn = None if draws is None else draws[start : start + step]
        _run_schedule(recorder, part, passes, micro_batch_size, vocab_size, blocks[:1], drawn, gradients=gradients)
        recorder.check_finite()
        if progress is not None:
            done = min(len(blocks), (start + step) * layout.data) - start * layout.data
            progress(done)


def _run_schedule(
    recorder: Recorder,
    blocks: Blocks,
    passes: int,
    micro_batch_size: int,
    vocab_size: int,
    filler: Blocks,
    draws: torch.Tensor | None,
    *,
    gradients: bool,
) -> None:
    """``[n, s + 1]`` blocks in ``passes`` micro-batches; samples beyond ``n`` are ``filler`` and do not count.

    With ``[n, s]`` ``draws`` the labels are the model's own.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    chunks = recorder.chunks
    missing = passes * micro_batch_size - len(blocks)
    filled = Blocks.cat([blocks, *[filler] * missing])
    if draws is not None:
        draws = torch.cat([draws, draws.new_zeros(missing, draws.shape[1])])
    rows = [min(max(len(blocks) - i * micro_batch_size, 0), micro_batch_size) for i in range(passes)]
    starts = range(0, len(filled), micro_batch_size)
    batches = [
        (
            filled[start : start + micro_batch_size],
            count,
            None if draws is None else draws[start : start + micro_batch_size],
        )
        for start, count in zip(starts, rows, strict=True)
    ]
    width = blocks.shape[1]

    def forward_step(
        iterator: Iterator[tuple[Blocks, int, torch.Tensor | None]], model: GPTModel
    ) -> tuple[torch.Tensor, Any]:
        batch, recorder.rows, drawn = next(iterator)
        tokens, counted = batch.tokens.to(next(model.parameters()).device), batch.counted()
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:]
        positions, mask = document_inputs(inputs, None if batch.segments is None else batch.segments[:, :-1])
        counted = None if counted is None else counted.to(inputs.device)

        def loss(logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
            own = labels if drawn is None else own_labels(logits, drawn, vocab_size, recorder.groups)
            # Each sample's own mean, added up: a sample's gradient depends on no other. The schedule divides.
            return sample_losses(logits, own, vocab_size, recorder.groups, counted).sum() * passes, {}

        return model(inputs, positions, mask), loss if gradients else _nothing

    # Each chunk of an interleaved pipeline reads the micro-batches for itself.
    iterators = [iter(batches) for _ in chunks]
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=passes,
        seq_length=width - 1,
        micro_batch_size=micro_batch_size,
        forward_only=not gradients,
        collect_non_loss_data=not gradients,
    )


def _nothing(output: torch.Tensor, *, non_loss_data: bool = True) -> None:
    """Keep no output: the hooks have read the pass. The signature is that of Megatron's ``collect_non_loss_data``."""


def collect(
    recorder: Recorder,
    shape: ModelShape,
    *,
    samples: int,
    tokens: int,
    fingerprint: str | None = None,
    estimator: str = "activation",
) -> dict[Criterion, Scores]:
    """Statistics of this rank's units over its samples -> scores of all units over all samples. Collective.

    Args:
        recorder: after its last pass; its statistics are used up.
        shape: of the whole model.
        samples, tokens: run by all data-parallel ranks together.
        fingerprint, estimator: kept with the scores.
    """
    return {
        criterion: _collect(recorder, criterion, shape, samples, tokens, fingerprint, estimator)
        for criterion in recorder.criteria
    }


def _collect(
    recorder: Recorder,
    criterion: Criterion,
    shape: ModelShape,
    samples: int,
    tokens: int,
    fingerprint: str | None,
    estimator: str,
) -> Scores:
    gather = functools.partial(_gather_scores, recorder, criterion, shape.num_layers, samples)
    experts = shape.num_moe_experts
    heads = gather("attention", shape.num_attention_heads, tensor_parallel=True)
    norms = [gather(site, shape.hidden_size) for site in ("input_norm", "mlp_norm")]
    return Scores(
        ffn=gather("ffn", shape.ffn_hidden_size, tensor_parallel=True, experts=experts),
        heads=heads,
        groups=recorder.group_scores(functools.partial(gather, tensor_parallel=True), heads, shape),
        hidden=(norms[0] + norms[1]).sum(0),
        layers=recorder.layer_scores(gather, shape, tokens),
        experts=gather("experts", 1, experts=experts)[..., 0] if experts else None,
        shape=shape,
        samples=samples,
        tokens=tokens,
        estimator=estimator,
        sequence=criterion.sequence,
        batch=criterion.batch,
        fingerprint=fingerprint,
    )


def _gather_scores(
    recorder: Recorder,
    criterion: Criterion,
    layers: int,
    samples: int,
    site: str,
    size: int,
    *,
    tensor_parallel: bool = False,
    experts: int | None = None,
) -> torch.Tensor:
    """``[L, size]`` or, of ``experts`` experts, ``[L, E, size]`` scores of one site, on every rank. Collective.

    Args:
        recorder, criterion: whose statistics.
        layers, size: ``L`` and the number of units of the whole model.
        samples: run by all data-parallel ranks together.
        site: where the recorder took the activations.
        tensor_parallel: whether the site's units are split over the tensor-parallel ranks.
        experts: experts with such a site in each layer; None for a site outside them.
    """
    groups, batch = recorder.groups, recorder.batch_aggregation(criterion)
    scores = torch.zeros(layers, experts or 1, size, dtype=torch.float64, device=groups.device.torch)
    local = size // groups.layout.tensor if tensor_parallel else size
    for layer, expert in itertools.product(recorder.layers(), range(experts or 1)):
        statistics = recorder.statistics.get(Key(layer, site, expert), {}).get(criterion)
        if statistics is None:  # an expert that this rank's samples did not reach
            statistics = batch.statistics(scores.new_zeros(1, local), 0)
        finished = batch.finish(batch.all_reduce(statistics, groups.dp), samples)
        scores[layer, expert] = gathered(finished, groups.tp) if tensor_parallel else finished
    # Each layer is on one pipeline stage; the others hold zeros for it.
    dist.all_reduce(scores, group=groups.pp)
    return (scores if experts else scores[:, 0]).cpu()
