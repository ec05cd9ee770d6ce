"""``minitron.json``: sizes, constants and lineage of a checkpoint, which this package writes beside its weights.

A format's reader prefers it to what it would otherwise infer (a NeMo checkpoint with padded rows does not state the
true vocabulary size), and checks it against the tensors. The ``record.json`` of a stage is another file, see
:mod:`nemo_minitron.jobs.records`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from nemo_minitron.architecture import Architecture
from nemo_minitron.axes import Family, family
from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.errors import CheckpointError, MinitronError, ShapeError
from nemo_minitron.jobs.expected import expectation
from nemo_minitron.parsing import parse_json
from nemo_minitron.shape import ModelShape

__all__ = [
    "FILE_NAME",
    "ModelRecord",
    "package_versions",
    "parse_model_record",
    "peek_architecture",
    "peek_family",
    "peek_shape",
    "read_model_record",
    "write_model_record",
]

T = TypeVar("T")

FILE_NAME = "minitron.json"
FORMAT_VERSION = 1
PACKAGES = ("nemo-minitron", "torch", "megatron-core", "nemo-toolkit", "transformers", "safetensors")


@dataclasses.dataclass(frozen=True)
class ModelRecord:
    """The content of ``minitron.json`` that readers use: sizes, constants, what the model was made from, and hashes of
    its tensors.
    """

    shape: ModelShape
    architecture: Architecture
    lineage: dict[str, Any]
    weights: str | None = None
    sums: dict[str, int] = dataclasses.field(default_factory=dict)


def write_model_record(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    dtype: str,
    form: str,
    weights: str | None = None,
    sums: Mapping[str, int] | None = None,
) -> Path:
    """Write ``minitron.json`` into ``directory``.

    Args:
        checkpoint: what was written.
        directory: where.
        dtype: of the tensors written beside it.
        form: the format's name.
        weights: hash of all these tensors (:meth:`~nemo_minitron.checkpoints.weights.CastWeights.content`); None
            where another program wrote them.
        sums: CRC-32 of each of them, for a format that keeps none itself.
    """
    path = directory / FILE_NAME
    content = {
        "format_version": FORMAT_VERSION,
        "format": form,
        "shape": checkpoint.shape.to_dict(),
        "architecture": dataclasses.replace(checkpoint.architecture, dtype=dtype).to_dict(),
        "lineage": checkpoint.lineage,
        **({} if weights is None else {"weights": weights}),
        **({} if sums is None else {"sums": {name: f"{value:08x}" for name, value in sums.items()}}),
        "versions": package_versions(),
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def read_model_record(directory: Path) -> ModelRecord | None:
    """The model record in ``directory``; None where there is none, as in a checkpoint that another program wrote.

    Raises:
        CheckpointError: if it is there but cannot be understood.
    """
    path = directory / FILE_NAME
    return parse_model_record(path.read_bytes(), path) if path.is_file() else None


def parse_model_record(data: bytes, path: Path) -> ModelRecord:
    """The model record in the bytes of a ``minitron.json``; ``path`` names the file in messages.

    Raises:
        CheckpointError: if it cannot be understood.
    """
    try:
        content = parse_json(data)
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {version}; this release reads {FORMAT_VERSION}. "
                f"Use the release that wrote it"
            )
        weights = content.get("weights")
        return ModelRecord(
            ModelShape.from_dict(content["shape"]),
            Architecture(**content["architecture"]),
            content["lineage"],
            weights if isinstance(weights, str) else None,
            {name: int(value, 16) for name, value in content.get("sums", {}).items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ShapeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); restore the file or remove it") from error


def package_versions() -> dict[str, str | None]:
    """The installed version of each package that a checkpoint depends on; None where it is not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def peek_shape(checkpoint: str | Path) -> ModelShape | None:
    """The shape in a checkpoint's ``minitron.json``, without opening the weights; None without such a file.

    Within :func:`~nemo_minitron.jobs.expected.expecting`, that of the model which an earlier stage is going to write.

    Raises:
        CheckpointError: if the file is there and cannot be read.
    """
    is_expected, model = expectation(checkpoint)
    if is_expected:
        return None if model is None else model.shape
    return _peek(checkpoint, lambda content: ModelShape.from_dict(content["shape"]))


def peek_family(checkpoint: str | Path) -> Family:
    """The family in a checkpoint's ``minitron.json``; call it where :func:`peek_shape` returns a shape.

    Raises:
        CheckpointError: if the file is missing or cannot be read.
    """
    _, model = expectation(checkpoint)
    if model is not None:
        return family(model.architecture.family)
    stated = _peek(checkpoint, lambda content: family(content["architecture"]["family"]))
    if stated is None:
        raise CheckpointError(f"{checkpoint}: has no minitron.json; open the checkpoint to know its family")
    return stated


def peek_architecture(checkpoint: str | Path) -> Architecture | None:
    """The constants in a checkpoint's ``minitron.json``; None without such a file. Otherwise as :func:`peek_shape`.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    is_expected, model = expectation(checkpoint)
    if is_expected:
        return None if model is None else model.architecture
    return _peek(checkpoint, lambda content: Architecture(**content["architecture"]))


def _peek(checkpoint: str | Path, read: Callable[[Any], T]) -> T | None:
    path = Path(checkpoint) / "minitron.json"
    if not path.is_file():
        return None
    try:
        return read(parse_json(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MinitronError) as error:
        raise CheckpointError(f"{path}: not a readable model record ({error}); write the checkpoint again") from error
