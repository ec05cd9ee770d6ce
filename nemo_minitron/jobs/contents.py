"""The files of an output: names, sizes and hashes, which its record keeps, and what has become of them since."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nemo_minitron.jobs import skipped
from nemo_minitron.runtime.files import is_earlier

__all__ = ["SMALL", "contents_of", "damaged", "missing", "results_of"]

#: Directories of training state and logs: deleting them to free space loses no result.
_PASSING = ("checkpoints", "log", "logs", "previous", "tensorboard")
#: Files that users may edit or remove, and those that this suite writes into a finished output.
_FREE = ("README.md", "record.json", skipped.FILE_NAME)
#: Files that differ between two runs that give the same result: times, versions, paths and random numbers are in them.
_INCIDENTAL = ("metrics.jsonl", "minitron.json", ".metadata")
_BLOCK = 1 << 20
#: Bytes up to which the content of an input's file is checked before a stage starts: tables, scores, tokenizers. The
#: chunks of weights have checksums of their own, which are checked as they are read.
SMALL = 1 << 26


def contents_of(output: Path) -> dict[str, dict[str, Any]]:
    """The files that make an output: ``{path below it: {"size": bytes, "sha256": ...}}``; "." for a single file.

    Training state, logs, and outputs of child stages, which have records of their own, are left out.
    """
    files = list(_files(output))
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
        hashes = list(pool.map(_sha256, files))
    return {
        _name(output, file): {"size": file.stat().st_size, "sha256": sha}
        for file, sha in zip(files, hashes, strict=True)
    }


def results_of(contents: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The hashes of the files that make an output's result; with equal ones two outputs are the same to readers."""
    return {name: entry["sha256"] for name, entry in contents.items() if not _is_incidental(name)}


def _is_incidental(name: str) -> bool:
    """Whether a file of an output says more of the run than of its result.

    NeMo's descriptions name the run's directories and bear random names; a training's best state is kept beside its
    result.
    """
    parts = name.split("/")
    described = "context" in parts and "nemo_tokenizer" not in parts
    return parts[-1] in _INCIDENTAL or described or parts[0] == "best"


def missing(output: Path, contents: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What of an output is gone or has another size: one text for each file. It costs a look at each file's entry."""
    faults = []
    for name, entry in contents.items():
        path = output / name
        try:
            size = path.stat().st_size
        except OSError:
            faults.append(f"{path} is gone")
            continue
        if size != entry["size"]:
            faults.append(f"{path} has {size:,} bytes, not {entry['size']:,}")
    return faults


def damaged(output: Path, contents: Mapping[str, Mapping[str, Any]], *, limit: int | None = None) -> list[str]:
    """:func:`missing`, and the files whose content differs. It reads all files, or those of at most ``limit`` bytes."""
    faults = missing(output, contents)
    if faults:
        return faults
    names = [name for name, entry in contents.items() if limit is None or entry["size"] <= limit]
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
        hashes = pool.map(_sha256, [output / name for name in names])
        return [
            f"{output / name} is damaged: its content is not what was written"
            for name, sha in zip(names, hashes, strict=True)
            if sha != contents[name]["sha256"]
        ]


def _files(output: Path) -> Iterator[Path]:
    if output.is_file():
        yield output
        return
    for directory, below, names in os.walk(output):
        place = Path(directory)
        below[:] = sorted(
            name
            for name in below
            if name not in _PASSING
            and not (place / name / "record.json").exists()
            and not is_earlier(place / name)
            and not name.startswith(".")
        )
        for name in sorted(names):
            if name not in _FREE and not name.endswith(".lease") and not (place / name).is_symlink():
                yield place / name


def _name(output: Path, file: Path) -> str:
    return "." if file == output else file.relative_to(output).as_posix()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
