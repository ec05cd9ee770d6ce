"""``minitron reconstruct``: refit a pruned model to its teacher, layer by layer, before any training."""

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
from nemo_minitron.planning import HOST_FLOAT64, ReconstructionFlops
from nemo_minitron.pruning.kept import kept_path
from nemo_minitron.runtime.progress import progress_bar
from nemo_minitron.shape import uniform_faults
from nemo_minitron.stages.shared.checkpoints import format_faults, staged_checkpoint
from nemo_minitron.stages.shared.disk import checkpoint_need, described, expected, readable_model
from nemo_minitron.stages.shared.measuring import calibration_blocks, start_groups
from nemo_minitron.stages.shared.refitted import held_out_texts, measure
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
    if config.outside:
        outside = data_inputs(dataclasses.replace(config.data, sources=config.outside))
        data.files.extend(file for file in outside.files if file not in data.files)
        data.notes.extend(note for note in outside.notes if note not in data.notes)
        data.faults.extend(outside.faults)
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
    if config.held_out_samples:
        plan.costs["held-out losses"] = (
            f"{config.held_out_samples * config.data.sequence_length:,} tokens"
            f"{', and as many of ' + ', '.join(source.name for source in config.outside) if config.outside else ''}, "
            "for each of three models"
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
        flops = ReconstructionFlops.of(teacher, model, tokens)
        plan.flops = flops.forward + HOST_FLOAT64 * flops.float64
        if config.method == "block":
            trained = config.block.steps * config.block.samples * config.data.sequence_length
            plan.flops += 2.0 * model.parameters * (3 * trained + tokens)  # and five looks at a fifth of the tokens
            plan.costs["gradient steps"] = f"{config.block.steps} of {config.block.samples} samples, for each layer"
        measured = config.held_out_samples * config.data.sequence_length * (2 if config.outside else 1)
        plan.flops += 2.0 * measured * (teacher.parameters + 2 * model.parameters)
    return plan


def run(config: ReconstructConfig) -> dict[str, Any]:
    """Reconstruct the model; rank 0 writes it, with ``kept.json`` and :data:`FILE_NAME`.

    Returns:
        ``samples, tokens, matrices, refitted, error_before, error_after, layers, losses, seconds``: how many matrices
        and scales there are and how many of them were replaced, the mean over them of the error on held-out
        calibration tokens before and after, relative to the targets' power, of each layer the error of the hidden
        states, and the held-out losses of teacher, pruned and reconstructed model by source. With ``method=block`` also
        ``trained``, the number of layers that gradient steps made better.

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
    # With fewer tokens a model has another loss, of another text.
    texts = held_out_texts(config, teacher) if kept.vocab is None else {}
    subject = {
        "teacher": fingerprint(teacher),
        "model": fingerprint(model),
        "kept": _hash_of(kept_path(config.model)),
        "blocks": blocks.content()[:32],
        "dtype": config.runtime.dtype,
        "micro_batch_size": config.micro_batch_size,
        **({"block": vars(config.block)} if config.method == "block" else {}),
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
            block=config.block if config.method == "block" else None,
            budget=state_budget(config),
            trail=way,
            progress=advance,
        )
    dist.barrier()
    files, reports = layers.read(numbers)
    result = _result(config, model, files, blocks)
    losses = measure(config, groups, {"teacher": teacher, "pruned": model, "reconstructed": result}, texts)
    if groups.is_main:
        _write(config, result, reports, losses)
    way.close()
    return _metrics(blocks, reports, losses) | {"seconds": round(time.monotonic() - started, 3)}


def _hash_of(path: Path) -> str:
    """Of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _result(config: ReconstructConfig, model: Checkpoint, files: dict[str, Path], blocks: Blocks) -> Checkpoint:
    """The model with its new tensors."""
    from nemo_minitron.reconstruction import ReplacedWeights

    parent = {
        "path": str(model.path),
        "format": model.format,
        "shape": model.shape.to_dict(),
        "lineage": model.lineage,
    }
    return dataclasses.replace(
        model,
        weights=ReplacedWeights(model.weights, files),
        lineage={
            "made_by": "reconstruct",
            "method": config.method,
            "teacher": config.teacher,
            "samples": len(blocks),
            "tokens": len(blocks) * blocks.sequence_length,
            "parents": {"model": parent},
        },
    )


def _write(
    config: ReconstructConfig, result: Checkpoint, reports: list[dict[str, Any]], losses: dict[str, Any]
) -> None:
    """The model, and beside it what became of each of its tensors."""
    from nemo_minitron.checkpoints import write_checkpoint
    from nemo_minitron.pruning import load_kept, save_kept

    kept, shape = load_kept(kept_path(config.model))
    with (
        staged_checkpoint(config.output, config.format, overwrite=config.overwrite) as path,
        progress_bar("writing", len(result.weights.names())) as advance,
    ):
        write_checkpoint(result, path, config.format, progress=lambda name, done, total: advance(1))
        text = json.dumps({"method": config.method, "losses": losses, "layers": reports}, indent=1) + "\n"
        if path.is_dir():
            save_kept(kept, shape, kept_path(path))
            (path / FILE_NAME).write_text(text, encoding="utf-8")
        else:
            save_kept(kept, shape, kept_path(config.output))


def _metrics(blocks: Blocks, reports: list[dict[str, Any]], losses: dict[str, Any]) -> dict[str, Any]:
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
    trained = [report["block"] for report in reports if report.get("block") is not None]
    return {
        "samples": len(blocks),
        "tokens": len(blocks) * blocks.sequence_length,
        **({"trained": sum(block["steps"] > 0 for block in trained)} if trained else {}),
        "losses": losses,
        "matrices": len(matrices),
        "refitted": refitted,
        "error_before": round(mean["before"], 6),
        "error_after": round(mean["after"], 6),
        "layers": [round(report["error"], 6) for report in reports if report["error"] is not None],
    }
