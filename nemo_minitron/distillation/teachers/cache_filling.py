"""Writing a teacher's logits to a cache: every rank runs its part of the model, data-parallel ranks share the samples.

Samples that the cache holds already are not written again: a stopped job goes on where it was, and a longer training
adds to the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from nemo_minitron.distillation.losses.kernels import TopTokens
from nemo_minitron.distillation.losses.vocabulary_parallel import vocabulary_parallel_top_k
from nemo_minitron.distillation.teachers.documents import model_inputs
from nemo_minitron.distillation.teachers.frozen import Teacher
from nemo_minitron.distillation.teachers.logit_cache import (
    LogitCache,
    Manifest,
    Sample,
    encode,
    sample_keys,
    write_shard,
)
from nemo_minitron.errors import NonFiniteError
from nemo_minitron.runtime.groups import Groups

__all__ = ["fill_cache", "open_for_writing"]

_PASSES_PER_STEP = 4  # micro-batches of one run of the schedule


def open_for_writing(directory: Path, *, is_main: bool) -> LogitCache:
    """Open a cache that has a manifest; one rank repairs it before the others open it. Every rank calls it.

    Raises:
        DataError: if the directory is not a cache.
    """
    if is_main:
        LogitCache(directory, repair=True)
    dist.barrier()
    cache = LogitCache(directory)
    dist.barrier()  # nobody writes while another still looks: all must agree on what is missing
    return cache


@torch.no_grad()
def fill_cache(
    teacher: Teacher,
    groups: Groups,
    cache: LogitCache,
    tokens: torch.Tensor,
    starts: torch.Tensor,
    *,
    micro_batch_size: int,
    samples_per_shard: int,
    progress: Callable[[int], None],
) -> int:
    """Write the samples that a cache lacks. Every rank calls it with the same samples.

    Memory beyond the teacher: the logits of one micro-batch, ``[s, b, V/tp]`` (all log-probabilities: three float32
    tensors ``[s, b, V]``), and the encoded samples of one shard; of a compact cache 8 bytes for each token that is
    kept.

    Args:
        teacher: in ``groups``.
        groups: of this process.
        cache: as :func:`open_for_writing` gave it.
        tokens, starts: ``[n, s]`` input tokens and where their documents start.
        micro_batch_size: samples of one forward pass.
        samples_per_shard: samples of one file; a killed job loses at most so many per rank.
        progress: called with the number of samples done since its last call.

    Returns:
        Samples written, on all ranks together.

    Raises:
        NonFiniteError: if a logit is not finite.
    """
    manifest = cache.manifest
    keys = sample_keys(tokens, starts)
    first = {key: index for index, key in reversed(list(enumerate(keys)))}  # equal samples are written once
    missing = [index for key, index in first.items() if key not in cache]
    missing.sort()
    assigned = missing[groups.dp_rank :: groups.layout.data]
    writes = groups.is_last_stage and groups.tp_rank == 0
    passes = _PASSES_PER_STEP * (groups.layout.pipeline if groups.layout.virtual_pipeline else 1)
    pending: list[tuple[bytes, Sample]] = []
    for begin in range(0, len(assigned), passes * micro_batch_size):
        part = assigned[begin : begin + passes * micro_batch_size]
        # The schedule wants equal micro-batches: the last sample is repeated, and its repeats dropped.
        padded = torch.tensor(part + part[-1:] * (-len(part) % micro_batch_size))
        rows = padded.split(micro_batch_size)
        if groups.layout.virtual_pipeline:
            rows = (*rows, *[rows[-1]] * (-len(rows) % groups.layout.pipeline))
        kept = teacher.run([model_inputs(tokens[row], starts[row]) for row in rows])
        samples: list[Sample] = []
        for hidden in kept:
            samples += _encoded(teacher.logits(hidden), groups, manifest, keep=writes)
        pending += [(keys[index], sample) for index, sample in zip(part, samples, strict=False)]
        while len(pending) >= samples_per_shard:
            write_shard(cache.directory, manifest, pending[:samples_per_shard])
            del pending[:samples_per_shard]
        progress(len(part) * groups.layout.data)
    if pending:
        write_shard(cache.directory, manifest, pending)
    dist.barrier()
    return len(missing)


def _encoded(logits: torch.Tensor, groups: Groups, manifest: Manifest, *, keep: bool) -> list[Sample]:
    """``[s, b, V/tp]`` logits -> the b samples, on the rank that writes them. Collective over the group."""
    sequence, rows = logits.shape[:2]
    if manifest.k is not None:
        top = vocabulary_parallel_top_k(logits, groups.tp, vocab_size=manifest.vocab_size, k=manifest.k)
        _check(top.log_rest, manifest)
        if not keep:
            return []
        ids, values = (t.view(sequence, rows, -1) for t in (top.tokens, top.log_probabilities))
        log_rest_rows = top.log_rest.view(sequence, rows)
        return [encode(manifest, TopTokens(ids[:, row], values[:, row], log_rest_rows[:, row])) for row in range(rows)]
    columns = [torch.empty_like(logits) for _ in range(groups.layout.tensor)]
    dist.all_gather(columns, logits.contiguous(), group=groups.tp)
    whole = torch.cat(columns, -1)[..., : manifest.vocab_size].float().log_softmax(-1)
    _check(whole, manifest)
    return [encode(manifest, log_probabilities=whole[:, row]) for row in range(rows)] if keep else []


def _check(values: torch.Tensor, manifest: Manifest) -> None:
    if values.isnan().any():
        raise NonFiniteError(
            "the teacher's logits are not finite; nothing of this micro-batch was cached. Look for damaged weights "
            "with `minitron evaluate`"
        )
