"""The export stage's GGUF files: written in all kinds at once, then read back and held against the model."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.formats.entry import Calibrate, Compare, ExportNotes, WriteOptions
from nemo_minitron.checkpoints.formats.gguf.checkpoint import open_gguf
from nemo_minitron.checkpoints.formats.gguf.importance import measure_importance, read_importance, write_importance
from nemo_minitron.checkpoints.formats.gguf.kinds import KINDS
from nemo_minitron.checkpoints.formats.gguf.llama_cpp import check_quantizer, has_llama_cpp, quantize_file
from nemo_minitron.checkpoints.formats.gguf.writer import write_gguf
from nemo_minitron.checkpoints.formats.huggingface.checkpoint import write_hf
from nemo_minitron.checkpoints.formats.huggingface.loader import load_transformers
from nemo_minitron.checkpoints.model_record import write_model_record
from nemo_minitron.checkpoints.weights import torch_dtype
from nemo_minitron.errors import CheckpointError

if TYPE_CHECKING:
    from nemo_minitron.config import ExportConfig

__all__ = ["export_gguf", "exported_files", "file_name"]

#: Bytes of a weight, for plans.
_BYTES = {"F32": 4.0, "F16": 2.0, "BF16": 2.0, "Q8_0": 34 / 32, "Q4_0": 18 / 32, "Q2_K": 0.42, "Q3_K_M": 0.49,
          "Q4_K_S": 0.58, "Q4_K_M": 0.61, "Q5_K_S": 0.69, "Q5_K_M": 0.71, "Q6_K": 0.83}  # fmt: skip
#: The largest root mean square of what a kind of numbers loses of a matrix, relative to the matrix's own: for random
#: numbers the half step of a block is less. A file beyond it was not written as it should be.
_LOST = {"F32": 1e-7, "F16": 1e-3, "BF16": 4e-3, "Q8_0": 0.02, "Q4_0": 0.25}
_LOST_BY_LLAMA_CPP = 0.5
IMPORTANCE = "importance.gguf"
#: Weights of norms are stored plus one in some families.
_VECTORS = 4e-7
#: What llama.cpp's logits from float32 may differ, relative to the largest: its sums are in another order.
_EXACT = 1e-3


def file_name(kind: str) -> str:
    """What the file of a kind is called: ``model-Q8_0.gguf``."""
    return f"model-{kind}.gguf"


def exported_files(config: ExportConfig) -> dict[str, float]:
    """Names of the files that an export writes -> bytes for each parameter."""
    return {file_name(kind): _BYTES[kind] for kind in config.gguf.types}


def export_gguf(
    source: Checkpoint,
    directory: Path,
    config: ExportConfig,
    notes: ExportNotes,
    calibrate: Calibrate | None = None,
    compare: Compare | None = None,
) -> dict[str, Any]:
    """Write a file for each of ``gguf.types`` into a directory, and check each by reading it back.

    Args:
        source: the model.
        directory: is made; the caller renames what it is part of.
        config: of the stage.
        notes: name, base and license.
        calibrate: runs a model of transformers over text, for an importance matrix of the types with a K, which is
            written beside them; None for none.
        compare: compares the logits of the model and of a file, each by its own loader; None where they are not to be.

    Returns:
        By kind ``file, bytes, stored, weight_error, logits``: the file's name, its size, how many matrices it has in
        which kind of numbers, the root mean square of what its numbers lose, relative to the model's, and what
        llama.cpp computes from it against the model: ``relative, same_choice``. The last two are None without
        ``verify``, and the last one where ``llama-cpp-python`` is not installed.

    Raises:
        ShapeError, CheckpointError, MissingDependency: as
            :func:`~nemo_minitron.checkpoints.formats.gguf.writer.write_gguf`, before anything is written; for a file
            that does not hold the model.
    """
    kinds = config.gguf.types
    direct = [kind for kind in kinds if not KINDS[kind].by_llama_cpp]
    others = [kind for kind in kinds if KINDS[kind].by_llama_cpp]
    if others:
        check_quantizer(others)
        if config.gguf.importance is not None:
            read_importance(Path(config.gguf.importance))
    directory.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix=".base-", dir=directory) as scratch:
        base = _base(direct, source.architecture.dtype) if others else None
        files = {kind: directory / file_name(kind) for kind in direct}
        if base is not None and base not in files:
            files[base] = Path(scratch) / file_name(base)
        stored = write_gguf(source, files, notes=notes, requantized=others)
        importance = _importance(source, directory, Path(scratch), config, calibrate) if others else None
        for kind in others:
            assert base is not None
            quantize_file(files[base], directory / file_name(kind), kind, importance=importance)
    by_llama_cpp = compare is not None and has_llama_cpp()
    figures = {}
    for kind in kinds:
        path = directory / file_name(kind)
        opened = open_gguf(path)
        figures[kind] = {
            "file": path.name,
            "bytes": path.stat().st_size,
            "stored": stored.get(kind) or _stored(path),
            "weight_error": _weight_error(source, opened, kind) if config.verify else None,
            "logits": _logits(compare(source, opened), opened, kind) if compare and by_llama_cpp else None,
        }
    write_model_record(source, directory, dtype=source.architecture.dtype, form="gguf")
    return figures


def _importance(
    source: Checkpoint, directory: Path, scratch: Path, config: ExportConfig, calibrate: Calibrate | None
) -> Path | None:
    """The importance matrix that is given, or one of text; None without either.

    The whole model is in memory, in float32.
    """
    if config.gguf.importance is not None or calibrate is None:
        return None if config.gguf.importance is None else Path(config.gguf.importance)
    write_hf(source, scratch / "hf", WriteOptions(source.architecture.dtype, scratch / "parts"))
    model = load_transformers(scratch / "hf", torch_dtype(source.architecture.dtype)).float().eval()
    measured = measure_importance(source, model, calibrate)
    path = directory / IMPORTANCE
    write_importance(path, measured, chunk=config.data.sequence_length)
    return path


def _logits(found: Any, opened: Checkpoint, kind: str) -> dict[str, float]:
    """What llama.cpp computes from a file, against the model by its own loader.

    Raises:
        CheckpointError: if llama.cpp computes another model from float32.
    """
    if kind == "F32" and not found.relative <= _EXACT:
        raise CheckpointError(
            f"{opened.path}: llama.cpp does not compute the model: logits differ by {found.relative:.2e} of their "
            f"scale where {_EXACT:.0e} is allowed; do not use the file, and report this"
        )
    return {"relative": found.relative, "same_choice": found.same_choice}


def _base(direct: Sequence[str], dtype: str) -> str:
    """The kind that llama.cpp quantizes from: one that holds the model's numbers."""
    exact = {"bfloat16": "BF16", "float16": "F16"}.get(dtype, "F32")
    return "F32" if "F32" in direct else exact


def _stored(path: Path) -> dict[str, int]:
    """How many matrices of a file are in which kind of numbers."""
    from gguf import GGUFReader

    names = [tensor.tensor_type.name for tensor in GGUFReader(path).tensors if len(tensor.shape) > 1]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def _weight_error(source: Checkpoint, opened: Checkpoint, kind: str) -> float:
    """What the numbers of a file lose: the root mean square of all matrices' differences, relative to the matrices.

    Raises:
        CheckpointError: for a tensor that loses more than its kind of numbers can, or a vector that is another one.
    """
    lost = total = 0.0
    most = _LOST.get(kind, _LOST_BY_LLAMA_CPP)
    for name in source.weights.names():
        ours, theirs = source.weights.tensor(name).float(), opened.weights.tensor(name)
        difference = (ours - theirs).double().square().sum().item()
        size = ours.double().square().sum().item()
        if ours.ndim == 1:
            bad = not bool(((ours - theirs).abs() <= _VECTORS * (1 + ours.abs())).all())
        else:
            bad = not math.sqrt(difference) <= most * math.sqrt(size)  # written so that NaN fails
            lost, total = lost + difference, total + size
        if bad:
            raise CheckpointError(
                f"{opened.path}: {name} does not hold the model's numbers (relative difference "
                f"{math.sqrt(difference / size) if size else difference:.3g}); do not use the file, and report this"
            )
    return math.sqrt(lost / total) if total else 0.0
