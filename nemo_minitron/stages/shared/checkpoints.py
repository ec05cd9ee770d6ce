"""Code of the stages that write checkpoints: writing aside until verified, and the rows of their plans."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron import axes
from nemo_minitron.checkpoints.formats import FORMATS, written_formats
from nemo_minitron.checkpoints.model_record import peek_architecture, peek_family, peek_shape
from nemo_minitron.errors import CheckpointError, ConfigError, ShapeError
from nemo_minitron.jobs.atomic import MARKER
from nemo_minitron.jobs.plans import human_bytes, human_count
from nemo_minitron.runtime.atomic import staging, write_aside
from nemo_minitron.runtime.memory import LIVE_SHARE, host_memory
from nemo_minitron.shape import uniform_faults

if TYPE_CHECKING:
    from nemo_minitron.architecture import Architecture
    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.shape import ModelShape

__all__ = [
    "check_conversion",
    "conversion_faults",
    "format_faults",
    "model_costs",
    "staged_checkpoint",
    "verified",
    "written_faults",
]

logger = logging.getLogger(__name__)

_BYTES = {"float32": 4, "bfloat16": 2}


def format_faults(output: str, form: str) -> list[str]:
    """Faults of an output whose name does not fit its format: one format is a file, another a directory."""
    suffix, needed = Path(output).suffix, FORMATS[form].suffix
    if needed is not None:
        return [] if suffix == needed else [f"output={output}: format={form} writes a file; end its name in {needed}"]
    if any(suffix == FORMATS[name].suffix for name in written_formats()):
        return [f"output={output}: format={form} writes a directory; choose a name that does not end in {suffix}"]
    return []


def written_faults(
    shape: ModelShape, architecture: Architecture, formats: Sequence[str], *, export: bool = False
) -> list[str]:
    """Why a model cannot be written in all of the formats; ``export``: to be opened without this package."""
    return [
        fault for form in dict.fromkeys(formats) for fault in FORMATS[form].refuses(shape, architecture, export=export)
    ]


def conversion_faults(model: str, formats: Sequence[str], *, verify: bool, export: bool = False) -> list[str]:
    """Why a model cannot be written in all the formats, and verified if asked for, as far as a plan can know."""
    shape, architecture = peek_shape(model), peek_architecture(model)
    if shape is None or architecture is None:
        return []
    return _conversion_faults(shape, architecture, formats, verify, export)


def check_conversion(model: Checkpoint, formats: Sequence[str], *, verify: bool, export: bool = False) -> None:
    """:func:`conversion_faults` of an opened model, before it is written.

    Raises:
        ShapeError: with every fault.
    """
    if faults := _conversion_faults(model.shape, model.architecture, formats, verify, export):
        raise ShapeError(faults)


def _conversion_faults(
    shape: ModelShape, architecture: Architecture, formats: Sequence[str], verify: bool, export: bool
) -> list[str]:
    faults = written_faults(shape, architecture, formats, export=export)
    return faults + (uniform_faults(shape, "verify=true, which compares logits") if verify else [])


def model_costs(checkpoint: str, dtype: str = "float32") -> dict[str, str]:
    """Parameters of a model and the size of its weights, for a plan; empty if they are not known yet."""
    shape = peek_shape(checkpoint)
    if shape is None:
        return {}
    count = axes.parameter_count(peek_family(checkpoint), shape)
    if dtype not in _BYTES:  # auto
        size = f"at most {human_bytes(count * max(_BYTES.values()))}, in float32"
    else:
        size = f"{human_bytes(count * _BYTES[dtype])} in {dtype}"
    return {"parameters": human_count(count), "weights": size}


@contextmanager
def staged_checkpoint(output: str, form: str, *, overwrite: bool) -> Iterator[Path]:
    """Where to write a checkpoint; it becomes ``output`` when the block ends without an error.

    Until then, an existing ``output`` is untouched: a checkpoint that fails its verification never gets the output's
    name.

    Yields:
        A path of the output's name in a directory of its own; the caller creates it.

    Raises:
        ConfigError: if the name and the format contradict each other.
        CheckpointError: if ``output`` exists and ``overwrite`` is off, or the disk is full.
    """
    if faults := format_faults(output, form):
        raise ConfigError(faults)
    path = Path(output).absolute()
    overwrite = overwrite or _is_empty(path)
    with write_aside(path, overwrite=overwrite, error=CheckpointError, alone=True) as aside:
        folder = staging(path)
        folder.mkdir()
        yield folder / path.name
        (folder / path.name).rename(aside)
        if aside.is_dir():
            (aside / MARKER).touch()


def verified(
    source: Checkpoint, target: Checkpoint, verify: Callable[..., Any] | None, memory: str
) -> dict[str, Any] | None:
    """Compare the logits of a conversion; returns the figures for the record, or None if ``verify`` is off.

    Args:
        source, target: of the conversion.
        verify: :func:`nemo_minitron.checkpoints.verify`; None where it is off.
        memory: the setting of that name.
    """
    if verify is None:
        return None
    difference = verify(source, target, streamed=True) if _streams(memory, source) else verify(source, target)
    return {
        "max_difference": difference.max_difference,
        "scale": difference.scale,
        "relative": difference.relative,
        "same_choice": difference.same_choice,
        "dtype": difference.dtype,
        "loader": difference.loader,
    }


def _streams(memory: str, model: Checkpoint) -> bool:
    """Whether a check has a layer at a time in memory: by the setting, else by the free memory."""
    if memory != "auto":
        return memory == "streamed"
    needed, free = _BYTES["float32"] * axes.parameter_count(model.family, model.shape), host_memory()[1]
    if needed <= LIVE_SHARE * free:
        return False
    logger.info(
        "%s: %s of weights in float32 do not fit into %s of free memory; verifying layer by layer (memory=streamed)",
        model.path, human_bytes(needed), human_bytes(free),
    )  # fmt: skip
    return True


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
