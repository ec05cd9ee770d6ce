"""What must be the same in a run that was disturbed and in one that was not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

__all__ = ["differences", "leftovers", "signature"]

#: Keys of JSON files whose values are times, sizes of processes, or names that every run draws anew.
_VOLATILE = frozenset(
    ("seconds", "tokens_per_second", "tflops", "memory", "step_time", "validation_step_time", "written")
)
_OF_A_RECORD = ("stage", "name", "hash", "settings", "parents", "metrics")
#: Logs, caches of text, training state, what a save names anew every time, and pages with times in them.
_NOT_COMPARED = ("logs", "log", "tensorboard", "text", "checkpoints", "report", "README.md", ".metadata")


def signature(run: Path) -> dict[str, str]:
    """A hash for each file of a run that has a meaning: weights, logits, scores, tables, losses, settings, records.

    Of JSON files and of JSON lines the values count, without times.
    """
    return {
        path.relative_to(run).as_posix(): _hash(path)
        for path in sorted(run.rglob("*"))
        if path.is_file() and not path.is_symlink() and not _is_left_out(path.relative_to(run))
    }


def differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Names of files that are gone, new or different."""
    found = []
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            found.append(f"{name} is {'gone' if name not in after else 'new' if name not in before else 'different'}")
    return found


def leftovers(run: Path) -> list[str]:
    """Temporary files, leases and old states below a run that has ended."""
    patterns = (".*.partial*", ".*.files*", ".*.replaced*", "*.lease*", "*.dead", "*.now", "*.stoppable", "*.journal*")
    found = {path for pattern in (*patterns, "previous", ".*.staged") for path in run.rglob(pattern)}
    return sorted(str(path.relative_to(run)) for path in found)


def _is_left_out(path: Path) -> bool:
    return any(part in _NOT_COMPARED for part in path.parts) or path.name.endswith((".lock", ".damaged"))


def _hash(path: Path) -> str:
    """Of what a file means; "unreadable" where it is no JSON though its name says so."""
    try:
        return hashlib.sha256(_meaning(path)).hexdigest()
    except (ValueError, AttributeError):
        return "unreadable"


def _meaning(path: Path) -> bytes:
    content = path.read_bytes()
    if path.name.endswith("record.json"):
        content = _canonical({key: json.loads(content).get(key) for key in _OF_A_RECORD})
    elif path.suffix == ".json":
        content = _canonical(json.loads(content))
    elif path.suffix == ".jsonl":
        content = b"\n".join(_canonical(json.loads(line)) for line in content.splitlines())
    return content


def _canonical(value: Any) -> bytes:
    return json.dumps(_steady(value), sort_keys=True).encode()


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _steady(entry) for key, entry in value.items() if key not in _VOLATILE}
    return [_steady(entry) for entry in value] if isinstance(value, list) else value
