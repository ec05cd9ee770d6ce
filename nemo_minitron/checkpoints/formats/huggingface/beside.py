"""What else lies in a Hugging Face directory: read, known to change nothing, refused, or named in a warning."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection
from pathlib import Path

from nemo_minitron.accounting import warn_once
from nemo_minitron.checkpoints.formats.huggingface import known
from nemo_minitron.checkpoints.formats.huggingface.config import read_json
from nemo_minitron.checkpoints.model_record import FILE_NAME
from nemo_minitron.checkpoints.tokenizer.names import CONFIG, named_files, tokenizer_files
from nemo_minitron.errors import CheckpointError

__all__ = ["account_files"]

_READ = ("config.json", "generation_config.json", FILE_NAME)


def account_files(path: Path, first: Path, weights: Collection[Path]) -> None:
    """Account for every file and folder of a Hugging Face directory.

    Args:
        path: the directory.
        first: the file of weights that was chosen, or the index of several.
        weights: files whose tensors are read.

    Raises:
        CheckpointError: for what changes the model that the weights are.
    """
    entries = sorted(entry.name for entry in path.iterdir())
    for name in entries:
        for pattern, remedy in known.REFUSED_FILES.items():
            if fnmatch.fnmatchcase(name, pattern):
                raise CheckpointError(f"{path / name} lies beside the weights: {remedy}")
    described = read_json(path / CONFIG) if CONFIG in entries else {}
    tokenizer = {Path(name).parts[0] for name in tokenizer_files(path, named_files(described))}
    used = {*_READ, first.name, *(file.name for file in weights), *tokenizer}
    other = [
        name
        for name in entries
        if name not in used and not any(fnmatch.fnmatchcase(name, pattern) for pattern in known.FILES)
    ]
    leftover = [name for name in other if _is_weights(name)]
    if leftover:
        warn_once(path, f"weights that are not read, since {first.name} comes first: {_shown(leftover)}")
    if other := [name for name in other if name not in leftover]:
        warn_once(path, f"files that are not known are left behind: {_shown(other)}")


def _is_weights(name: str) -> bool:
    return name.removesuffix(".index.json").endswith((".safetensors", ".bin", ".h5", ".msgpack", ".pt", ".pth"))


def _shown(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} others" if len(names) > 10 else "")
