"""Checkpoints: one door per format, one protocol between them (:mod:`nemo_minitron.checkpoints.base`).

``open_checkpoint`` finds out which format a path is; ``write_checkpoint`` writes any opened checkpoint as any format;
so three readers and three writers give all six directions. Importing this package imports neither torch nor NeMo.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron._lazy import lazy
from nemo_minitron.checkpoints.base import Checkpoint, Weights
from nemo_minitron.errors import CheckpointError

if TYPE_CHECKING:
    from nemo_minitron.checkpoints.live import load_into
    from nemo_minitron.checkpoints.verification.compare import verify

__all__ = ["FORMATS", "Checkpoint", "Weights", "load_into", "open_checkpoint", "verify", "write_checkpoint"]

FORMATS = ("hf", "nemo2", "nemo")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a HF directory, a NeMo 2 directory, or a ``.nemo`` file. Metadata is read, tensors are not.

    Nothing in the checkpoint is executed: no pickle beyond tensors, no class that a file names.

    Raises:
        CheckpointError: if the path is missing, is none of these, or is damaged.
    """
    path = Path(path).expanduser()
    if not path.exists():
        aside = sorted(path.parent.glob(f".{path.name}.replaced.*")) if path.parent.is_dir() else []
        hint = f"; an earlier output was moved to {aside[0]} by a save that was killed" if aside else ""
        raise CheckpointError(f"{path} does not exist; check the path{hint}")
    if path.is_file():
        if path.suffix == ".gguf":
            raise CheckpointError(f"{path} is a GGUF file; turn it into a HF directory first (gguf.convert_gguf)")
        from nemo_minitron.checkpoints.formats.nemo1.door import open_nemo1

        return open_nemo1(path)
    if (path / "config.json").is_file():
        from nemo_minitron.checkpoints.formats.huggingface.door import open_hf

        return open_hf(path)
    if (path / "context").is_dir() or (path / "weights").is_dir():
        from nemo_minitron.checkpoints.formats.nemo2.door import open_nemo2

        return open_nemo2(path)
    if (path / "model_config.yaml").is_file():
        from nemo_minitron.checkpoints.formats.nemo1.door import open_nemo1

        return open_nemo1(path)
    content = sorted(entry.name for entry in path.iterdir())
    found = f"it holds {', '.join(content[:5])}" if content else "it is empty"
    raise CheckpointError(
        f"{path} is not a checkpoint ({found}); expected config.json (Hugging Face), weights/ and context/ (NeMo 2), "
        f"or a .nemo file"
    )


def write_checkpoint(
    checkpoint: Checkpoint,
    path: str | Path,
    format: str,
    *,
    dtype: str | None = None,
    vocab_multiple: int = 128,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Checkpoint:
    """Write a checkpoint as ``format`` and open the result.

    The output is written aside and renamed, so ``path`` holds the old output or the whole new one, also after a full
    disk or a killed process. One layer plus one embedding is held in memory at most.

    Args:
        checkpoint: any opened checkpoint, its ``weights`` possibly wrapped (pruned, cast).
        path: a directory for "hf" and "nemo2", a file for "nemo".
        format: "hf", "nemo2" or "nemo".
        dtype: of the tensors written; None keeps the source's.
        vocab_multiple: NeMo formats store the vocabulary padded with zero rows to a multiple of this.
        overwrite: replace what stands at ``path``.
        progress: called as ``progress(tensor name, tensors done, tensors in all)``.

    Raises:
        CheckpointError: bad arguments, existing output, a damaged source, a full disk.
    """
    from nemo_minitron.checkpoints.saving import staging, write_aside
    from nemo_minitron.checkpoints.weights import torch_dtype

    if format not in FORMATS:
        raise CheckpointError(f"format {format!r} is not known; use one of {', '.join(FORMATS)}")
    if not isinstance(vocab_multiple, int) or vocab_multiple < 1:
        raise CheckpointError(f"vocab_multiple={vocab_multiple!r} must be a whole number of at least 1")
    path, dtype = Path(path).expanduser(), dtype or checkpoint.architecture.dtype
    torch_dtype(dtype)
    with write_aside(path, overwrite=overwrite) as partial:
        if format == "hf":
            from nemo_minitron.checkpoints.formats.huggingface.door import write_hf

            write_hf(checkpoint, partial, dtype=dtype, progress=progress)
        elif format == "nemo2":
            from nemo_minitron.checkpoints.formats.nemo2.door import write_nemo2

            write_nemo2(checkpoint, partial, dtype=dtype, vocab_multiple=vocab_multiple, progress=progress)
        else:
            from nemo_minitron.checkpoints.formats.nemo1.door import write_nemo1

            write_nemo1(
                checkpoint, partial, staging(path), dtype=dtype, vocab_multiple=vocab_multiple, progress=progress
            )
    return open_checkpoint(path)


# what needs torch and Megatron is imported when it is asked for
__getattr__ = lazy(__name__, {"load_into": "live", "verify": "verification.compare"})
