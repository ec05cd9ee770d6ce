"""Code of ``export`` for quantized models: their plan, and writing and measuring them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron import axes
from nemo_minitron.checkpoints.model_record import peek_architecture, peek_shape
from nemo_minitron.config import ExportConfig
from nemo_minitron.errors import ShapeError
from nemo_minitron.jobs.plans import PlannedPath, StagePlan
from nemo_minitron.quantization.matrices import export_faults, matrices_of
from nemo_minitron.quantization.ranges import TrainedFor
from nemo_minitron.quantization.schemes import Scheme, scheme_of
from nemo_minitron.stages.shared.measuring import blocks_of

if TYPE_CHECKING:
    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.data import Blocks

__all__ = ["calibration", "check_quantized", "output_name", "plan_quantized", "write_all"]

logger = logging.getLogger(__name__)


def output_name(scheme: str) -> str:
    """What a quantized model is called below the output of ``export``."""
    return f"hf-{scheme}"


def _schemes(config: ExportConfig) -> list[Scheme]:
    """The schemes of an export. A group size that is not given is that which the student was trained for."""
    trained = TrainedFor.read(Path(config.model))
    group = config.group_size
    if group is None and trained is not None and trained.quantize == "int4":
        group = trained.group_size
    return [scheme_of(name, group) for name in dict.fromkeys(config.quantize)]


def _measured(config: ExportConfig) -> bool:
    """Whether any of the schemes is calibrated on text; the others follow from the weights."""
    return any(scheme.inputs or scheme.searched for scheme in _schemes(config))


def plan_quantized(config: ExportConfig, plan: StagePlan) -> None:
    """Add what the quantized models read, write and leave as it is."""
    from nemo_minitron.data.inputs import data_inputs

    if not config.quantize and not config.measures_importance:
        return
    data = data_inputs(config.data)
    plan.reads += [PlannedPath(path, what) for path, what in data.files]
    plan.notes += data.notes
    plan.faults += data.faults
    if _measured(config) or config.measures_importance:
        tokens = config.samples * config.data.sequence_length
        plan.costs["calibration"] = f"{tokens:,} tokens in {config.samples:,} samples"
    trained = TrainedFor.read(Path(config.model))
    if trained is not None and config.group_size not in (None, trained.group_size) and "int4" in config.quantize:
        plan.notes.append(
            f"group_size={config.group_size}: the student was trained for {trained.quantize} with groups of "
            f"{trained.group_size}, and loses more with others"
        )
    shape, architecture = peek_shape(config.model), peek_architecture(config.model)
    for scheme in _schemes(config):
        plan.writes.append(PlannedPath(str(Path(config.output) / output_name(scheme.name)), f"model ({scheme.title})"))
        if shape is None or architecture is None:
            continue
        if faults := export_faults(shape, architecture, scheme):
            plan.faults += faults
        elif note := matrices_of(axes.family(architecture.family), shape, scheme).note():
            plan.notes.append(f"{scheme.name}: {note}")
    if "nvfp4" in config.quantize or "fp8" in config.quantize:
        plan.notes.append("FP8 runs on Hopper and later GPUs, NVFP4 on Blackwell; both are written on any machine")


def check_quantized(config: ExportConfig, model: Checkpoint) -> None:
    """Check that the model can be written in all the quantizations, before any work.

    Raises:
        ShapeError: with every fault.
    """
    faults = [fault for scheme in _schemes(config) for fault in export_faults(model.shape, model.architecture, scheme)]
    if faults:
        raise ShapeError(faults)


def write_all(config: ExportConfig, source: Checkpoint, output: Path) -> dict[str, Any]:
    """Write and measure every quantized model of an export.

    Args:
        config: of the stage.
        source: the model.
        output: the stage's output, where it is being written.

    Returns:
        By quantization: ``path, algorithm, group_size, quantized, kept, bytes, loss, float_loss, tokens``. ``loss`` is
        of the written files, read back.

    Raises:
        MinitronError: for text that cannot be used, or a model that ModelOpt fails on.
    """
    from nemo_minitron.checkpoints import write_checkpoint
    from nemo_minitron.checkpoints.formats.huggingface.loader import load_transformers
    from nemo_minitron.checkpoints.weights import torch_dtype
    from nemo_minitron.quantization import load_quantized, mean_loss, write_quantized
    from nemo_minitron.report import write_export_card

    calibration = blocks_of(config.data, source, "calibration", config.samples) if _measured(config) else None
    held_out = blocks_of(config.data, source, "held_out", config.tokens // config.data.sequence_length)
    floats = output / ".float"
    write_checkpoint(source, floats, "hf", dtype=config.dtype)
    dtype = config.dtype or source.architecture.dtype
    float_loss = mean_loss(load_transformers(floats, torch_dtype(dtype)).float().eval(), held_out)
    trained = TrainedFor.read(source.path)
    found: dict[str, Any] = {}
    for scheme in _schemes(config):
        path = output / output_name(scheme.name)
        matrices = write_quantized(
            floats,
            source,
            path,
            scheme,
            dtype=dtype,
            calibrate=lambda model: _run(model, calibration),
            ranges=trained.ranges if trained is not None and trained.quantize == scheme.name else None,
        )
        if note := matrices.note():
            logger.warning("%s: %s", scheme.name, note)
        loss = mean_loss(load_quantized(path), held_out)
        write_export_card(
            source,
            path / "README.md",
            run_dir=None,
            base_model=config.base_model,
            license_name=config.license,
        )
        where = str(Path(config.output) / output_name(scheme.name))
        found[scheme.name] = {
            "path": where,
            "algorithm": scheme.algorithm,
            "group_size": scheme.group,
            "quantized": len(matrices.held),
            "kept": dict(matrices.kept),
            "bytes": sum(file.stat().st_size for file in path.glob("*.safetensors")),
            "loss": loss,
            "float_loss": float_loss,
            "tokens": held_out.labels,
        }
        logger.info("exported %s: held-out loss %.4f, of the float model %.4f", where, loss, float_loss)
    shutil.rmtree(floats)
    return found


def calibration(config: ExportConfig, source: Checkpoint) -> Callable[[Any], None] | None:
    """Runs a model over the calibration text of an export; None where nothing but ``quantize`` asks for any."""
    if not config.measures_importance:
        return None
    return lambda model: _run(model, blocks_of(config.data, source, "calibration", config.samples))


def _run(model: Any, blocks: Blocks | None) -> None:
    """Run the model over the inputs of the blocks, one after the other."""
    assert blocks is not None, "the scheme is one that measures"
    device = next(model.parameters()).device
    for block in blocks.tokens[:, :-1]:
        model(block[None].to(device))
