"""``minitron cache``: write a teacher's logits of the blocks that a distillation trains and validates on.

Output: the cache itself (:mod:`nemo_minitron.distillation.teachers.logit_cache`). It is filled in place, shard by
shard, so that a stopped job can go on; the shards, never the record, tell which samples are done.
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron import axes
from nemo_minitron.checkpoints.model_record import peek_family, peek_shape
from nemo_minitron.config import CacheConfig
from nemo_minitron.errors import CheckpointError, ConfigError
from nemo_minitron.jobs.atomic import MARKER, check_output
from nemo_minitron.jobs.plans import DiskNeed, PlannedPath, StagePlan, human_bytes, human_count
from nemo_minitron.planning.disk import logits_bytes
from nemo_minitron.runtime.progress import progress_bar
from nemo_minitron.shape import uniform_faults
from nemo_minitron.stages.shared.disk import block_needs
from nemo_minitron.stages.shared.measuring import start_groups
from nemo_minitron.stages.shared.training import training_blocks
from nemo_minitron.stages.shared.vocabulary import plan_pair_vocabulary

if TYPE_CHECKING:
    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.distillation.teachers.logit_cache import Manifest

__all__ = ["plan", "run"]

logger = logging.getLogger(__name__)


def plan(config: CacheConfig) -> StagePlan:
    """What :func:`run` would read, write and cost."""
    from nemo_minitron.data.inputs import data_inputs

    data = data_inputs(config.data)
    plan = StagePlan(
        "cache",
        reads=[PlannedPath(config.teacher, "teacher"), *(PlannedPath(path, what) for path, what in data.files)],
        writes=[PlannedPath(config.output, "logit cache")],
        costs={"tokens": human_count(config.tokens)},
        notes=data.notes,
        faults=data.faults,
    )
    if config.student is not None:
        plan.reads.append(PlannedPath(config.student, "student, of which the tokenizer"))
        plan_pair_vocabulary(plan, config.student, config.teacher)
    shape = peek_shape(config.teacher)
    if shape is None:
        return plan
    layout = config.parallel
    plan.faults += [f"teacher: {fault}" for fault in uniform_faults(shape, "a logit cache")]
    layout_faults = shape.layout_faults(tensor=layout.tensor, pipeline=layout.pipeline_stages)
    plan.faults += [f"teacher: {fault}" for fault in layout_faults]
    if config.k is not None and config.k >= shape.vocab_size:
        plan.faults.append(_too_many(config.k, shape.vocab_size))
    parameters = axes.parameter_count(peek_family(config.teacher), shape)
    plan.flops = 2.0 * parameters * config.tokens
    plan.costs |= {"parameters": human_count(parameters), "FLOPs": human_count(plan.flops)}
    per_token = logits_bytes(shape.vocab_size, config.k, config.values, error_bound=config.error_bound)
    size, least, about = per_token * config.tokens, None, ""
    if config.values == "compact":
        # It depends on the text: uncertain by a tenth for a known kind of teacher, and a top_p may keep one token each.
        least, about = size / 2 if config.top_p is None else 0.0, "about " if config.top_p is None else "at most about "
    plan.costs["size on disk"] = f"{about}{human_bytes(size)}, {human_bytes(per_token)} a token"
    plan.disk.append(DiskNeed("logits", config.output, size, least=least))
    plan.disk += block_needs(config.data, (config.steps + config.validation_batches) * config.global_batch_size)
    return plan


def _too_many(k: int, vocab_size: int) -> str:
    return f"k={k}: the vocabulary has {vocab_size} tokens; set k=null to keep all"


def run(config: CacheConfig) -> dict[str, Any]:
    """Fill the cache. Every rank runs this.

    Returns:
        ``samples`` of the training, samples ``written`` by this run, ``tokens``, ``bytes_per_token`` on disk,
        ``tokens_per_second``.

    Raises:
        MinitronError: for a teacher, data or layout that do not fit each other, or an output that holds another cache.
    """
    import torch

    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.checkpoints.tokenizer.comparison import Vocabulary, compare
    from nemo_minitron.data.blocks import Blocks
    from nemo_minitron.distillation.compatibility import announce, check_model
    from nemo_minitron.distillation.teachers.cache_filling import fill_cache, open_for_writing
    from nemo_minitron.distillation.teachers.documents import block_starts
    from nemo_minitron.distillation.teachers.frozen import Teacher
    from nemo_minitron.distillation.teachers.logit_cache import LogitCache

    checkpoint = open_checkpoint(config.teacher)
    check_model(checkpoint, config.parallel, config.data.sequence_length)
    manifest = _manifest(config, checkpoint)
    groups = start_groups(config)
    _check_output(config, manifest)
    torch.distributed.barrier()
    if groups.is_main:
        _prepare(config, manifest, checkpoint)
    cache = open_for_writing(Path(config.output), is_main=groups.is_main)
    reader, common = checkpoint, None
    if config.student is not None:
        student = open_checkpoint(config.student)
        common = compare(Vocabulary.of("student", student), Vocabulary.of("teacher", checkpoint))
        announce(common, student.path)
        reader = checkpoint if common.cuts_alike else student
    blocks = Blocks.cat([Blocks.of(part) for part in training_blocks(config, reader)])
    if common is not None and not common.whole:
        blocks.check_common(common.size, common.unlike, what="the blocks", names=common.names)
    tokens, starts = block_starts(blocks)
    teacher = Teacher.load(checkpoint, groups, dtype=getattr(torch, config.runtime.dtype))
    started = time.monotonic()
    with progress_bar("caching", len(tokens), completed=min(len(cache), len(tokens)), shown=groups.is_main) as advance:
        written = fill_cache(
            teacher,
            groups,
            cache,
            tokens,
            starts,
            micro_batch_size=config.micro_batch_size,
            samples_per_shard=config.samples_per_shard,
            progress=advance,
        )
    seconds = time.monotonic() - started
    if not groups.is_main:
        return {}
    cache = LogitCache(Path(config.output))
    per_token = cache.bytes_on_disk / (len(cache) * manifest.sequence_length)
    logger.info("%d samples, %d of them new, %.1f bytes a token", len(cache), written, per_token)
    return {
        "samples": len(tokens),
        "written": written,
        "tokens": tokens.numel(),
        "bytes_per_token": round(per_token, 2),
        "tokens_per_second": round(written * manifest.sequence_length / seconds, 1),
    }


def _manifest(config: CacheConfig, teacher: Checkpoint) -> Manifest:
    from nemo_minitron.checkpoints.fingerprint import model_fingerprint
    from nemo_minitron.checkpoints.tokenizer.trimming import tokenizer_fingerprint
    from nemo_minitron.distillation.teachers.logit_cache import Manifest

    if teacher.tokenizer is None:
        raise CheckpointError(f"{config.teacher}: carries no tokenizer to cut text with; import it with its tokenizer")
    if config.k is not None and config.k >= teacher.shape.vocab_size:
        raise ConfigError(_too_many(config.k, teacher.shape.vocab_size))
    return Manifest(
        teacher=model_fingerprint(teacher),
        tokenizer=tokenizer_fingerprint(teacher.tokenizer),
        vocab_size=teacher.shape.vocab_size,
        sequence_length=config.data.sequence_length,
        k=config.k,
        values=config.values,
        dtype=config.runtime.dtype,
        error_bound=config.error_bound if config.values == "compact" else None,
        top_p=config.top_p,
    )


def _check_output(config: CacheConfig, manifest: Manifest) -> None:
    """Check that the output may be written, or added to.

    Raises:
        ConfigError: for an output that holds another cache, or is not a cache.
    """
    from nemo_minitron.distillation.teachers.logit_cache import Manifest

    output = Path(config.output)
    if config.overwrite:
        check_output(output, True)
        return
    manifest_there = Manifest.read(output)
    if manifest_there is None:
        check_output(output, False)
    elif differences := manifest_there.differences(manifest):
        raise ConfigError(
            [f"{output} holds a cache with {difference}" for difference in differences]
            + ["write this one to another output, or replace it with --overwrite"]
        )
    elif not config.resume:
        raise ConfigError(f"{output} exists and resume=false; set resume=true to add to it, or --overwrite")


def _prepare(config: CacheConfig, manifest: Manifest, teacher: Checkpoint) -> None:
    """Remove an output that is to be overwritten; create the directory of a new cache. One rank calls it."""
    from nemo_minitron.checkpoints.tokenizer.files import copy_tokenizer
    from nemo_minitron.distillation.teachers.manifest import MANIFEST, TOKENIZER, cached_tokenizer

    output = Path(config.output)
    if config.overwrite:
        shutil.rmtree(output, ignore_errors=True)
    if not (output / MANIFEST).is_file():
        output.mkdir(parents=True, exist_ok=True)
        (output / MARKER).touch()
        manifest.write(output)
    if teacher.tokenizer is not None and cached_tokenizer(output) is None:
        copy_tokenizer(teacher.tokenizer, output / TOKENIZER)
