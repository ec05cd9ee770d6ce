"""Refitted layers on disk, so that a later process goes on at the layer where a reconstruction was stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import CheckpointError
from nemo_minitron.runtime.files import replace_file

if TYPE_CHECKING:
    import torch

__all__ = ["RefittedLayers"]

_REPORT = "report"


class RefittedLayers:
    """A directory with a safetensors file for each refitted layer, its report in the file's metadata.

    Args:
        directory: made where it is missing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def save(self, number: int, tensors: Mapping[str, torch.Tensor], report: Mapping[str, Any]) -> None:
        """Write one layer's file, whole or not at all.

        Args:
            number: of the layer; the number of layers for what lies after them.
            tensors: by canonical name; may be none.
            report: JSON values.
        """
        from safetensors.torch import save

        self.directory.mkdir(parents=True, exist_ok=True)
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {_REPORT: json.dumps(report)})
        replace_file(self._file(number), content)

    def read(self, numbers: Sequence[int]) -> tuple[dict[str, Path], list[dict[str, Any]]]:
        """The file of each tensor, and the reports.

        Raises:
            CheckpointError: if a file is missing or damaged.
        """
        from safetensors import SafetensorError, safe_open

        files: dict[str, Path] = {}
        reports = []
        for number in numbers:
            path = self._file(number)
            try:
                with safe_open(path, framework="pt") as file:
                    files |= dict.fromkeys(file.keys(), path)
                    reports.append(json.loads(file.metadata()[_REPORT]))
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{path}: is no readable layer of a reconstruction ({error}); remove {self.directory.parent} and "
                    "start again"
                ) from error
        return files, reports

    def has(self, numbers: Sequence[int]) -> bool:
        """Whether the files of all of these layers are there."""
        return all(self._file(number).is_file() for number in numbers)

    def _file(self, number: int) -> Path:
        return self.directory / f"layer-{number:04d}.safetensors"
