"""Training checkpoints: the state before the last one is kept, and a damaged one is refused before it is loaded.

NeMo and NeMo-Aligner keep the last checkpoint of a training alone, load it without looking at its checksums, and
unpickle its ``common.pt``. Here the one before stays in ``previous``, beside ``checkpoints``, until the training ends:
NeMo takes every directory in ``checkpoints`` for a checkpoint of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from nemo_minitron.errors import CheckpointError, first_line

__all__ = ["check_state", "clear_previous", "keep_previous", "use_previous"]

PREVIOUS = "previous"
_COMMON = "common.pt"
#: What NeMo-Aligner's trainings name in ``common.pt`` beyond what torch itself takes for safe.
KNOWN_CLASSES = frozenset(
    (
        "builtins.dict",
        "builtins.int",
        "builtins.list",
        "collections.defaultdict",
        "omegaconf.base.ContainerMetadata",
        "omegaconf.base.Metadata",
        "omegaconf.dictconfig.DictConfig",
        "omegaconf.listconfig.ListConfig",
        "omegaconf.nodes.AnyNode",
        "typing.Any",
    )
)


def check_state(checkpoint: Path, *, begin_again: str) -> None:
    """Refuse a damaged training checkpoint. Every rank calls it, and reads its share of the chunks.

    Args:
        checkpoint: a directory as NeMo writes it, or NeMo-Aligner.
        begin_again: what the user can do where there is no checkpoint before it.

    Raises:
        CheckpointError: with what is damaged, and what to do about it.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    fault = next(_faults(checkpoint, rank, world), None)
    if fault is None:
        return
    before = _previous(checkpoint.parent)
    remedy = f"remove {checkpoint} to go on from {before[-1].name}, the checkpoint before" if before else begin_again
    raise CheckpointError(f"the training state in {checkpoint} is damaged: {fault}; {remedy}")


def _faults(checkpoint: Path, rank: int, world: int) -> Iterator[str]:
    import torch

    from nemo_minitron.checkpoints.formats.torch_dist.checksums import damage
    from nemo_minitron.checkpoints.formats.torch_dist.reader import TorchDist

    weights = checkpoint / "weights"
    directory = weights if weights.is_dir() else checkpoint
    try:
        store = TorchDist(directory)
    except CheckpointError as error:
        yield str(error)
        return
    yield from store.damage(rank, world)
    common = directory / _COMMON
    try:
        with common.open("rb") as file:
            if (fault := damage(file)) is not None:
                yield f"{common} is damaged ({fault})"
                return
        names = set(torch.serialization.get_unsafe_globals_in_checkpoint(common)) - KNOWN_CLASSES
        if names:  # NeMo unpickles it without asking what it holds
            yield f"{common} names {', '.join(sorted(names))}, which no training of NeMo writes and might run code"
    except Exception as error:  # torch's unpickler fails in any way
        reason = first_line(error)
        yield f"{common} cannot be read ({reason})"


def keep_previous(checkpoint: Path) -> None:
    """Move a checkpoint that a newer one has replaced to ``previous``, in place of what is there. One rank calls it."""
    folder = checkpoint.parent.with_name(PREVIOUS)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with contextlib.suppress(FileNotFoundError):
        checkpoint.rename(folder / checkpoint.name)


def use_previous(folder: Path) -> None:
    """Bring the checkpoint before the last one back where the last one is gone. Every rank calls it.

    Args:
        folder: of a training's checkpoints.
    """
    if not any(path.is_dir() for path in folder.glob("*-last")):
        for path in _previous(folder):
            with contextlib.suppress(FileNotFoundError):  # the first rank moves it
                folder.mkdir(parents=True, exist_ok=True)
                path.rename(folder / path.name)


def clear_previous(folder: Path) -> None:
    """Remove the checkpoint before the last one, at the end of a training. One rank calls it."""
    shutil.rmtree(folder.with_name(PREVIOUS), ignore_errors=True)


def _previous(folder: Path) -> list[Path]:
    return sorted(path for path in folder.with_name(PREVIOUS).glob("*-last") if path.is_dir())
