"""``minitron export``: write a model as ``hf/``, ``nemo2/``, ``model.nemo`` and ``gguf/``, or quantized."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron import axes
from nemo_minitron.checkpoints.formats import FORMATS, ExportNotes
from nemo_minitron.config import ExportConfig
from nemo_minitron.jobs.atomic import stage_output
from nemo_minitron.jobs.plans import DiskNeed, PlannedPath, StagePlan, human_count
from nemo_minitron.jobs.records import owner_of
from nemo_minitron.stages.shared.checkpoints import check_conversion, conversion_faults, model_costs, verified
from nemo_minitron.stages.shared.disk import checkpoint_need, expected, readable_model
from nemo_minitron.stages.shared.quantized import calibration, check_quantized, plan_quantized, write_all

if TYPE_CHECKING:
    from nemo_minitron.checkpoints import Checkpoint

__all__ = ["plan", "run"]

logger = logging.getLogger(__name__)


def plan(config: ExportConfig) -> StagePlan:
    """What :func:`run` would read, write and cost."""
    output = Path(config.output)
    plan = StagePlan(
        "export",
        reads=[PlannedPath(config.model, "model")],
        writes=[PlannedPath(str(output / FORMATS[form].output_name), f"model ({form})") for form in config.formats],
        costs=model_costs(config.model, config.dtype or "float32"),
        faults=conversion_faults(config.model, config.formats, verify=config.verify, export=True),
    )
    if (model := readable_model(config.model)) is not None:
        plan.costs.setdefault("parameters", human_count(model.parameters))
        for form in dict.fromkeys(config.formats):
            entry = FORMATS[form]
            place = output / entry.output_name
            if entry.exported is None:
                plan.disk.append(checkpoint_need(f"model ({form})", str(place), model, form, dtype=config.dtype))
                plan.makes[str(place)] = expected(model, config.model, dtype=config.dtype)
                continue
            for name, width in entry.exported(config).items():
                size = width * model.parameters
                plan.disk.append(DiskNeed(f"model ({form})", str(place / name), size, stay=size))
                plan.makes[str(place / name)] = expected(model, config.model, dtype="float32")
    plan_quantized(config, plan)
    if config.verify and config.formats:
        plan.notes.append("each result is loaded by its own side's loader and its logits compared")
    return plan


def run(config: ExportConfig) -> dict[str, Any]:
    """Write every format and, with ``verify``, compare logits; the output appears once all formats are correct.

    Returns:
        ``parameters, formats``: for each format ``path`` and ``verification``, or ``files`` of a format that is one
        file for each kind of numbers. With ``quantize`` also ``quantized``: see
        :func:`~nemo_minitron.stages.shared.quantized.write_all`.

    Raises:
        MinitronError: for a model that cannot be read, or a result with other logits.
    """
    from nemo_minitron.checkpoints import open_checkpoint, verify, write_checkpoint
    from nemo_minitron.checkpoints.verification import compare_logits
    from nemo_minitron.report import write_export_card

    source = open_checkpoint(config.model)
    check_conversion(source, config.formats, verify=config.verify, export=True)
    check_quantized(config, source)
    named = dataclasses.replace(
        source, lineage={"made_by": "export", "parents": {"model": {"path": config.model, "lineage": source.lineage}}}
    )
    exports: dict[str, Any] = {}
    quantized: dict[str, Any] = {}
    with stage_output(config.output, config.overwrite) as output:
        for form in dict.fromkeys(config.formats):
            entry, path = FORMATS[form], output / FORMATS[form].output_name
            record: dict[str, Any] = {"path": str(Path(config.output) / entry.output_name)}
            if entry.export is not None:
                # both loaders have the whole model in memory
                compare = compare_logits if config.verify and config.memory != "streamed" else None
                notes, calibrate = _notes(named, config), calibration(config, source)
                record["files"] = entry.export(named, path, config, notes, calibrate, compare)
            else:
                written = write_checkpoint(named, path, form, dtype=config.dtype, max_shard_size=config.max_shard_size)
                record["verification"] = verified(source, written, verify if config.verify else None, config.memory)
            if entry.card:
                write_export_card(
                    source,
                    path / "README.md",
                    run_dir=_run_dir(config.model),
                    base_model=config.base_model,
                    license_name=config.license,
                    library=entry.card,
                )
            exports[form] = record
            logger.info("exported %s", record["path"])
        if config.quantize:
            quantized = {"quantized": write_all(config, source, output)}
    return {"parameters": axes.parameter_count(source.family, source.shape), "formats": exports, **quantized}


def _notes(model: Checkpoint, config: ExportConfig) -> ExportNotes:
    """What the files of a model may say of where it comes from."""
    from nemo_minitron.report import export_notes

    return export_notes(model, base_model=config.base_model, license_name=config.license)


def _run_dir(model: str) -> Path | None:
    """The directory that holds the output of the stage that made a model; None if no record says so."""
    output = owner_of(Path(model))
    return None if output is None else output.parent
