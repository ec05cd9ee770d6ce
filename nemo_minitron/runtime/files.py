"""Small files that appear under their name whole or not at all, and lines that a kill may have cut off."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_minitron.parsing import parse_json
from nemo_minitron.runtime.atomic import write_aside

__all__ = ["is_earlier", "read_json_lines", "replace_file", "resumed_lines", "size_of", "take_umask"]

logger = logging.getLogger(__name__)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a directory."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def replace_file(path: Path, content: str | bytes) -> None:
    """Write ``content`` (text as UTF-8) beside ``path`` and rename it there; what stood there is replaced.

    Raises:
        MinitronError: if the disk is full.
    """
    with write_aside(path, overwrite=True, parents=False) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


def take_umask(path: Path) -> None:
    """Give a file the mode that the umask says; safetensors' own writer leaves it to its owner alone (0600)."""
    umask = os.umask(0o077)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file up to its first line that is not whole; none where there is no file."""
    records: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                record = parse_json(line)
            except ValueError:  # a UnicodeDecodeError too
                break
            if not isinstance(record, dict):
                break
            records.append(record)
    return records


def resumed_lines(path: Path, keep: Callable[[dict[str, Any]], bool], *, done: int, every: int = 1) -> None:
    """Prepare the metrics of a training that is resumed: lines of steps that are trained again are dropped.

    Lines that are gone or damaged are said in a warning; a damaged file is kept as ``<name>.damaged``.

    Args:
        path: JSONL with a ``step`` (from 1) in each line; lines with a ``split`` are no training steps.
        keep: whether a line stays.
        done: steps of the resumed checkpoint, 0 without one.
        every: of so many steps there is a line.

    Raises:
        MinitronError: if the disk is full.
    """
    lines = [line for line in read_json_lines(path) if isinstance(line.get("step"), int) and keep(line)]
    steps = [0, *(line["step"] for line in lines if "split" not in line)]
    every = max(every, *(after - before for before, after in itertools.pairwise(steps)), 1)
    if done - steps[-1] >= every:
        damaged = ""
        if path.exists() and path.stat().st_size:
            shutil.copyfile(path, path.with_name(f"{path.name}.damaged"))
            damaged = f"; what the file held is in {path.name}.damaged"
        logger.warning(
            "%s: the lines of steps %d to %d are gone; the training itself goes on unchanged%s",
            path,
            steps[-1] + 1,
            done,
            damaged,
        )
    replace_file(path, "".join(json.dumps(line) + "\n" for line in lines))


def is_earlier(output: Path) -> bool:
    """Whether an output is one of other settings, kept beside the present one as ``<name>@<twelve hex digits>``."""
    return re.search(r"@[0-9a-f]{12}$", output.name.removesuffix(".nemo")) is not None
