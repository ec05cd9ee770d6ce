"""Small files that appear under their name whole or not at all, and lines that a kill may have cut off."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from nemo_minitron.runtime.atomic import write_aside

__all__ = ["is_earlier", "read_json_lines", "replace_file", "take_umask"]


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
    records = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def is_earlier(output: Path) -> bool:
    """Whether an output is one of other settings, kept beside the present one as ``<name>@<twelve hex digits>``."""
    return re.search(r"@[0-9a-f]{12}$", output.name.removesuffix(".nemo")) is not None
