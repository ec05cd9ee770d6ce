"""Records that a stage leaves out (``on_bad_record: skip``): their number in its results, and ``skipped.jsonl``.

Readers add them here, wherever in a stage they run. They are of this process: every rank reads all records, and rank 0
writes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from nemo_minitron.config import StageConfig
from nemo_minitron.runtime.files import read_json_lines, replace_file

__all__ = [
    "FILE_NAME", "METRIC", "add", "as_text", "entries", "forget", "restore", "run_module", "skipped_path", "watch",
]  # fmt: skip

FILE_NAME = "skipped.jsonl"
#: In the results of a stage that leaves bad records out.
METRIC = "skipped_records"

_entries: dict[tuple[str, str], dict[str, Any]] = {}
_watched = False


def forget() -> None:
    """Begin anew."""
    global _watched
    _entries.clear()
    _watched = False


def watch() -> None:
    """Say that bad records are left out now, even if there will be none."""
    global _watched
    _watched = True


def add(file: str, place: str, reason: str, record: Any) -> None:
    """Keep a record that is left out; one that is read again counts once.

    Args:
        file: that it stands in.
        place: in the file, as in messages.
        reason: why it is left out.
        record: itself, or its text if that is no JSON.
    """
    watch()
    _entries.setdefault((file, place), {"file": file, "place": place, "reason": reason, "record": record})


def restore(kept: Iterable[dict[str, Any]]) -> None:
    """Add what an earlier run left out of data that it cached."""
    watch()
    for entry in kept:
        _entries.setdefault((entry["file"], entry["place"]), entry)


def entries(files: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """What was left out in this process, of these files or of all."""
    wanted = None if files is None else set(files)
    return [entry for (file, _), entry in _entries.items() if wanted is None or file in wanted]


def as_text(kept: Iterable[dict[str, Any]]) -> str:
    """The lines of a ``skipped.jsonl``."""
    return "".join(json.dumps(entry, default=str) + "\n" for entry in kept)


def skipped_path(output: str | Path) -> Path:
    """The path of an output's list: inside a directory, beside a file."""
    output = Path(output)
    return output.with_name(f"{output.name}.{FILE_NAME}") if output.suffix == ".nemo" else output / FILE_NAME


def run_module(module: ModuleType, config: StageConfig, *, rank: int) -> dict[str, Any]:
    """Run a stage, or a part of it, and keep what it leaves out; every rank calls it.

    Returns:
        What the module's ``run`` returns; where bad records are left out, with their number, ``skipped_records``.
    """
    forget()
    metrics: dict[str, Any] = module.run(config)
    path = skipped_path(config.output)
    if rank != 0 or not (_watched or path.exists()):
        return metrics
    if path.parent == Path(config.output):
        restore(read_json_lines(path))  # of the run that this one goes on from, or of a part of the stage
    if _entries and path.parent.is_dir():
        replace_file(path, as_text(_entries.values()))
    elif not _entries:
        path.unlink(missing_ok=True)
    return {**metrics, METRIC: len(_entries)} if metrics else metrics
