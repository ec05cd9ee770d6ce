"""Training checkpoints: the state before the last one is kept, and a damaged one is refused before it is loaded.

NeMo and NeMo-Aligner keep the last checkpoint of a training alone, load it without looking at its checksums, and
unpickle its ``common.pt``. Here the one before stays in ``previous``, beside ``checkpoints``, until the training ends:
NeMo takes every directory in ``checkpoints`` for a checkpoint of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import CheckpointError, first_line
from nemo_minitron.parsing import parse_json
from nemo_minitron.runtime.files import replace_file

if TYPE_CHECKING:
    from nemo_minitron.checkpoints.base import Checkpoint
    from nemo_minitron.checkpoints.formats.torch_dist.reader import TorchDist

__all__ = ["SealedStates", "check_state", "clear_previous", "is_whole", "keep_previous", "seal_state", "use_previous"]

PREVIOUS = "previous"
_COMMON, _BACKEND, _METADATA = "common.pt", "metadata.json", ".metadata"
_WEIGHTS = "weights"
_SEAL = "sha256.json"
"""Beside the files of a checkpoint: hashes of the files that have no checksums of their own."""
_NAME = re.compile(r"(.*-)?step=\d+(-.*)?-last")
#: What ``common.pt`` of every training has; without it Lightning fails, or begins again without a word.
_ASKED_FOR = ("epoch", "global_step", "loops", "lr_schedulers", "optimizer_states", "pytorch-lightning_version")
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


class SealedStates:
    """Before a checkpoint callback of NeMo 2 or NeMo 1 among a class's bases: seals what that saves, and keeps the
    state that it would remove until the training has ended.
    """

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        """Saved by all ranks when this returns."""
        super()._save_checkpoint(trainer, filepath)  # type: ignore[misc]
        if trainer.is_global_zero:
            seal_state(Path(filepath.removesuffix(".ckpt")))
        # The first rank takes NeMo's marker away after the last barrier: a rank that went on to a resume would take
        # the state for an unfinished one and remove it, one that ended would let the launcher end the first.
        trainer.strategy.barrier()

    def _remove_checkpoint(self, trainer: Any, filepath: str, override_async: bool = False) -> None:
        """Called for the checkpoint that a newer one has replaced."""
        if trainer.is_global_zero:
            keep_previous(Path(filepath.removesuffix(".ckpt")))
        trainer.strategy.barrier()


def seal_state(checkpoint: Path) -> None:
    """Write the hashes of a checkpoint's small files beside them. One rank calls it, when all have saved."""
    directory = _files_of(checkpoint)
    hashes = {name: _sha256(directory / name) for name in (_METADATA, _COMMON, _BACKEND)}
    # In one step: another rank may look at it already.
    replace_file(checkpoint / _SEAL, json.dumps(hashes) + "\n")


def check_state(checkpoint: Path, *, begin_again: str, model: Checkpoint | None = None) -> None:
    """Refuse a damaged training checkpoint. Every rank calls it, and reads its share of the chunks.

    Args:
        checkpoint: a directory as NeMo writes it, or NeMo-Aligner.
        begin_again: what the user can do where there is no checkpoint before it.
        model: what is trained: the state must be of a model of its sizes. None: not compared.

    Raises:
        CheckpointError: with what is damaged, and what to do about it.
    """
    for path in sorted(checkpoint.parent.iterdir()):  # NeMo would take any directory for a checkpoint
        if path.is_dir() and not _NAME.fullmatch(path.name):
            raise CheckpointError(f"{path} is no checkpoint of a training; remove it, or give it back its name")
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    fault = next(_faults(checkpoint, rank, world, model), None)
    if fault is None:
        return
    before = _previous(checkpoint.parent)
    remedy = f"remove {checkpoint} to go on from {before[-1].name}, the checkpoint before" if before else begin_again
    raise CheckpointError(f"the training state in {checkpoint} is damaged: {fault}; {remedy}")


def _faults(checkpoint: Path, rank: int, world: int, model: Checkpoint | None) -> Iterator[str]:
    from nemo_minitron.checkpoints.formats.torch_dist.reader import TorchDist

    directory = _files_of(checkpoint)
    try:
        store = TorchDist(directory)
    except CheckpointError as error:
        yield str(error)
        return
    yield from _backend_faults(directory / _BACKEND)
    yield from store.damage(rank, world)
    yield from _common_faults(directory / _COMMON)
    yield from _seal_faults(checkpoint / _SEAL, directory)
    if model is not None:
        yield from _model_faults(store, model)


def _backend_faults(path: Path) -> Iterator[str]:
    """Megatron chooses by this file how it reads."""
    expected = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        yield f"{path} cannot be read ({first_line(error)})"
        return
    versions = {f"{name}_version": 1 for name in expected}
    if not isinstance(content, dict) or {**versions, **content} != {**versions, **expected}:
        yield f"{path} says {json.dumps(content)[:120]}, which no training of NeMo writes"


def _common_faults(common: Path) -> Iterator[str]:
    import torch

    from nemo_minitron.checkpoints.formats.torch_dist.checksums import damage

    try:
        with common.open("rb") as file:
            if (fault := damage(file)) is not None:
                yield f"{common} is damaged ({fault})"
                return
        names = set(torch.serialization.get_unsafe_globals_in_checkpoint(common)) - KNOWN_CLASSES
        if names:  # NeMo unpickles it without asking what it holds
            yield f"{common} names {', '.join(sorted(names))}, which no training of NeMo writes and might run code"
            return
        content = torch.load(common, map_location="cpu", weights_only=False)  # nothing but the classes above
    except Exception as error:  # torch's unpickler fails in any way
        yield f"{common} cannot be read ({first_line(error)})"
        return
    if not isinstance(content, dict):
        yield f"{common} holds {type(content).__name__}, not the state of a training"
        return
    nemo2 = common.parent.name == _WEIGHTS  # which has the optimizer's own part beside Lightning's
    if missing := [name for name in (*_ASKED_FOR, *["optimizer"] * nemo2) if name not in content]:
        yield f"{common} has no {', '.join(missing)}: it is not the state of a training"


def _seal_faults(seal: Path, directory: Path) -> Iterator[str]:
    """The hashes beside a checkpoint; those of earlier releases, and of a save that was killed, have none."""
    if not seal.is_file():
        return
    try:
        hashes = parse_json(seal.read_bytes())
        changed = [name for name, value in hashes.items() if _sha256(directory / name) != value]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        yield f"{seal} cannot be read ({first_line(error)})"
        return
    if changed:
        yield f"{directory / changed[0]} is not what was written"


def _model_faults(store: TorchDist, model: Checkpoint) -> Iterator[str]:
    from nemo_minitron.checkpoints.formats.torch_dist.reader import TorchDistWeights

    try:
        prefix = store.prefix(next(iter(model.family.first)))
        TorchDistWeights(store, model.shape, model.architecture.family, prefix).check()
    except CheckpointError as error:
        yield f"it is not of the model that is trained: {error}"


def _files_of(checkpoint: Path) -> Path:
    """NeMo 2 keeps them in ``weights``, NeMo 1 beside nothing else."""
    weights = checkpoint / _WEIGHTS
    return weights if weights.is_dir() else checkpoint


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was saved to its end: its metadata comes last."""
    return (_files_of(checkpoint) / _METADATA).is_file()


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
