"""sha256 of files. Digests of large files are cached by path, size and modification time."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from nemo_minitron.parsing import parse_json
from nemo_minitron.runtime.files import replace_file

__all__ = ["KEPT_BYTES", "file_digest"]

KEPT_BYTES = 64 << 20
"""Smaller files are read again each time."""
_SETTLED_SECONDS = 5.0  # a file that was changed just now may change again within the clock's resolution


def file_digest(path: Path, cache_dir: str | Path) -> str:
    """sha256 of a file's content, in hexadecimal.

    Args:
        path: the file.
        cache_dir: has the digests of large files, in ``digests.json``.
    """
    state = path.stat()
    if state.st_size < KEPT_BYTES:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    kept = Path(cache_dir) / "digests.json"
    name, now = str(path.resolve()), [state.st_size, state.st_mtime_ns]
    known = _read(kept)
    if known.get(name, [])[:2] == now:
        return str(known[name][2])
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if time.time() - state.st_mtime > _SETTLED_SECONDS:
        kept.parent.mkdir(parents=True, exist_ok=True)
        replace_file(kept, json.dumps(_read(kept) | {name: [*now, digest]}, indent=1) + "\n")
    return digest


def _read(kept: Path) -> dict[str, list[object]]:
    """The cached digests; none where the file is missing or damaged."""
    try:
        digests = parse_json(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    good = isinstance(digests, dict) and all(isinstance(entry, list) and len(entry) == 3 for entry in digests.values())
    return digests if good else {}
