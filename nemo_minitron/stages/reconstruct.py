"""``minitron reconstruct``: refit a pruned model to its teacher by least squares, layer by layer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.config import ReconstructConfig
from nemo_minitron.jobs.plans import PlannedPath, StagePlan
from nemo_minitron.pruning.kept import kept_path
from nemo_minitron.runtime.progress import progress_bar
from nemo_minitron.shape import uniform_faults
from nemo_minitron.stages.shared.checkpoints import format_faults, staged_checkpoint
from nemo_minitron.stages.shared.disk import checkpoint_need, described, expected, readable_model
from nemo_minitron.stages.shared.measuring import calibration_blocks, start_groups
from nemo_minitron.stages.shared.streaming import scratch, state_budget, streamed_model, trail

if TYPE_CHECKING:
    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.data import Blocks

__all__ = ["FILE_NAME", "plan", "run"]

FILE_NAME = "reconstruction.json"
logger = logging.getLogger(__name__)


def plan(config: ReconstructConfig) -> StagePlan:
    """What :func:`run` would read, write and cost."""
    from nemo_minitron.data.inputs import data_inputs

    data = data_inputs(config.data)
    tokens = config.samples * config.data.sequence_length
    plan = StagePlan(
        "reconstruct",
        reads=[
            PlannedPath(config.model, "pruned model"),
            PlannedPath(config.teacher, "teacher"),
            *(PlannedPath(path, what) for path, what in data.files),
        ],
        writes=[PlannedPath(config.output, f"reconstructed model ({config.format})")],
        costs={"calibration": f"{tokens:,} tokens in {config.samples:,} samples"},
        notes=[*data.notes, "a layer of each model is in memory at a time"],
        faults=[*data.faults, *format_faults(config.output, config.format)],
    )
    plan.makes[config.output] = None
    teacher, model = readable_model(config.teacher), readable_model(config.model)
    for known in (teacher, model):
        plan.faults += [] if known is None else uniform_faults(known.shape, "reconstruction")
    if model is not None:
        plan.costs["model"] = described(model)
        plan.makes[config.output] = expected(model, config.model)
        plan.disk.append(checkpoint_need("model", config.output, model, config.format))
    if teacher is not None and model is not None:
        # Forward: the teacher once, the pruned model some three times.
        plan.flops = 2.0 * tokens * (teacher.parameters + 3 * model.parameters)
    return plan


def run(config: ReconstructConfig) -> dict[str, Any]:
    """Reconstruct the model; rank 0 writes it, with ``kept.json`` and :data:`FILE_NAME`.

    Returns:
        ``samples, tokens, matrices, refitted, error_before, error_after, layers, seconds``: how many matrices and
        scales there are and how many of them were replaced, the mean over them of the error on held-out calibration
        tokens before and after, relative to the targets' power, and of each layer the error of the hidden states.

    Raises:
        MinitronError: for a model that was not cut from the teacher, for text that cannot be used, or values that are
            not finite.
    """
    import torch.distributed as dist

    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.importance import fingerprint
    from nemo_minitron.pruning import load_kept
    from nemo_minitron.reconstruction import RefittedLayers, check_cut, reconstruct

    started = time.monotonic()
    groups = start_groups(config)
    teacher, model = open_checkpoint(config.teacher), open_checkpoint(config.model)
    kept, _ = load_kept(kept_path(config.model))
    check_cut(model, teacher, kept, merged_heads=bool(model.lineage.get("merge_pruned_heads")))
    blocks = calibration_blocks(config, teacher)
    subject = {
        "teacher": fingerprint(teacher),
        "model": fingerprint(model),
        "kept": _hash_of(kept_path(config.model)),
        "blocks": blocks.content()[:32],
        "dtype": config.runtime.dtype,
        "micro_batch_size": config.micro_batch_size,
    }
    way = trail(config, groups, subject)
    layers = RefittedLayers(scratch(config) / "layers")
    numbers = range(model.shape.num_layers + 1)
    with progress_bar("reconstructing", len(numbers), shown=groups.is_main) as advance:
        reconstruct(
            streamed_model(config, teacher, groups),
            streamed_model(config, model, groups),
            kept,
            blocks,
            sink=lambda number, tensors, report: layers.save(number, tensors, report) if groups.is_main else None,
            micro_batch_size=config.micro_batch_size,
            budget=state_budget(config),
            trail=way,
            progress=advance,
        )
    dist.barrier()
    files, reports = layers.read(numbers)
    if groups.is_main:
        _write(config, model, files, reports, blocks)
    way.close()
    return _metrics(blocks, reports) | {"seconds": round(time.monotonic() - started, 3)}


def _hash_of(path: Path) -> str:
    """Of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _write(
    config: ReconstructConfig,
    model: Checkpoint,
    files: dict[str, Path],
    reports: list[dict[str, Any]],
    blocks: Blocks,
) -> None:
    """The model with its new tensors, and beside it what became of each."""
    from nemo_minitron.checkpoints import write_checkpoint
    from nemo_minitron.pruning import load_kept, save_kept
    from nemo_minitron.reconstruction import ReplacedWeights

    parent = {
        "path": str(model.path),
        "format": model.format,
        "shape": model.shape.to_dict(),
        "lineage": model.lineage,
    }
    result = dataclasses.replace(
        model,
        weights=ReplacedWeights(model.weights, files),
        lineage={
            "made_by": "reconstruct",
            "teacher": config.teacher,
            "samples": len(blocks),
            "tokens": len(blocks) * blocks.sequence_length,
            "parents": {"model": parent},
        },
    )
    kept, shape = load_kept(kept_path(config.model))
    with (
        staged_checkpoint(config.output, config.format, overwrite=config.overwrite) as path,
        progress_bar("writing", len(model.weights.names())) as advance,
    ):
        write_checkpoint(result, path, config.format, progress=lambda name, done, total: advance(1))
        text = json.dumps({"layers": reports}, indent=1) + "\n"
        if path.is_dir():
            save_kept(kept, shape, kept_path(path))
            (path / FILE_NAME).write_text(text, encoding="utf-8")
        else:
            save_kept(kept, shape, kept_path(config.output))


def _metrics(blocks: Blocks, reports: list[dict[str, Any]]) -> dict[str, Any]:
    matrices = [matrix for report in reports for matrix in report["matrices"]]
    mean = {name: sum(matrix[name] for matrix in matrices) / len(matrices) for name in ("before", "after")}
    refitted = sum(matrix["ridge"] is not None for matrix in matrices)
    logger.info(
        "%d of %d matrices and scales refitted; held-out error %.3f -> %.3f of the targets' power",
        refitted, len(matrices), mean["before"], mean["after"],
    )  # fmt: skip
    if short := sorted({matrix["name"] for matrix in matrices if matrix["short"]}):
        logger.warning(
            "fewer calibration tokens than columns of %s: strong ridges alone were tried; raise samples",
            ", ".join(short),
        )
    return {
        "samples": len(blocks),
        "tokens": len(blocks) * blocks.sequence_length,
        "matrices": len(matrices),
        "refitted": refitted,
        "error_before": round(mean["before"], 6),
        "error_after": round(mean["after"], 6),
        "layers": [round(report["error"], 6) for report in reports if report["error"] is not None],
    }
