"""Open and write checkpoints of any format."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.formats import FORMATS, Progress, WriteOptions, detect, written_formats
from nemo_minitron.checkpoints.weights import torch_dtype
from nemo_minitron.config.hub import cached_model, download_hint
from nemo_minitron.config.parts import SHARD_SIZE, parse_bytes
from nemo_minitron.errors import CheckpointError
from nemo_minitron.runtime.atomic import staging, write_aside

__all__ = ["open_checkpoint", "write_checkpoint"]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint of any format of :data:`~nemo_minitron.checkpoints.formats.FORMATS`.

    Metadata is read, tensors are not. Nothing in the checkpoint is executed: no pickle beyond tensors, no class that a
    file names.

    Args:
        path: of the checkpoint, or the name of a model (``org/name``) that is in the cache of the Hugging Face Hub.

    Raises:
        CheckpointError: if the path is missing, of no known format, or damaged.
    """
    given, path = str(path), Path(path).expanduser()
    if not path.exists():
        if (snapshot := cached_model(given)) is not None:
            return open_checkpoint(snapshot)
        aside = sorted(path.parent.glob(f".{path.name}.replaced.*")) if path.parent.is_dir() else []
        hint = f"; an earlier output was moved to {aside[0]} by a save that was killed" if aside else ""
        raise CheckpointError(f"{path} does not exist; check the path{hint}{download_hint(given)}")
    entry = detect(path)
    if entry is None and path.is_file():
        entry = FORMATS["nemo"]  # an archive under any name
    if entry is None:
        content = sorted(inside.name for inside in path.iterdir())
        held = f"it holds {', '.join(content[:5])}" if content else "it is empty"
        *others, last = (known.looks for known in FORMATS.values() if known.open is not None)
        raise CheckpointError(f"{path} is not a checkpoint ({held}); expected {', '.join(others)}, or {last}")
    if entry.open is None:
        raise CheckpointError(
            f"{path} is a {entry.title} file; turn it into a HF directory first, with `minitron import`"
        )
    return entry.open(path)


def write_checkpoint(
    checkpoint: Checkpoint,
    path: str | Path,
    format: str,
    *,
    dtype: str | None = None,
    vocab_multiple: int = 128,
    overwrite: bool = False,
    progress: Progress | None = None,
    max_shard_size: int | str = SHARD_SIZE,
) -> Checkpoint:
    """Write a checkpoint as ``format`` and open the result.

    The output is written aside and renamed, so ``path`` holds the old output or the whole new one, also after a full
    disk or a killed process. One layer plus one embedding is held in memory at most.

    Args:
        checkpoint: any opened checkpoint, its ``weights`` possibly wrapped (pruned, cast).
        path: a directory for "hf" and "nemo2", a file for "nemo".
        format: a name of :func:`~nemo_minitron.checkpoints.formats.written_formats`: "hf", "nemo2" or "nemo".
        dtype: of the tensors written; None keeps the source's.
        vocab_multiple: NeMo formats store the vocabulary padded with zero rows to a multiple of this.
        overwrite: replace an existing ``path``.
        progress: called as ``progress(tensor name, tensors done, tensors in all)``.
        max_shard_size: what a file of "hf" may hold, in bytes or as "5GB"; up to that the weights are one file.

    Raises:
        CheckpointError: bad arguments, existing output, a damaged source, a full disk.
    """
    if format not in written_formats():
        raise CheckpointError(f"format {format!r} is not known; use one of {', '.join(written_formats())}")
    if not isinstance(vocab_multiple, int) or vocab_multiple < 1:
        raise CheckpointError(f"vocab_multiple={vocab_multiple!r} must be a whole number of at least 1")
    write = FORMATS[format].write
    assert write is not None
    path, dtype = Path(path).expanduser(), dtype or checkpoint.architecture.dtype
    torch_dtype(dtype)
    try:
        limit = parse_bytes(str(max_shard_size))
    except ValueError as error:
        raise CheckpointError(f"max_shard_size: {error}") from error
    options = WriteOptions(dtype, staging(path), vocab_multiple, progress, limit)
    with write_aside(path, overwrite=overwrite, error=CheckpointError) as partial:
        write(checkpoint, partial, options)
    return open_checkpoint(path)
