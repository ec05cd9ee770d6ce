"""``minitron verify``: check outputs and checkpoints against the hashes and checksums that were written with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from nemo_minitron.errors import CheckpointError, ConfigError
from nemo_minitron.jobs.contents import damaged
from nemo_minitron.jobs.records import read_record, record_path

__all__ = ["Verified", "show_verified", "verify"]


@dataclass(frozen=True)
class Verified:
    """What was checked.

    Attributes:
        path: an output, or a directory with a distributed checkpoint.
        what: its stage, or "checkpoint".
        checked: number of files with a hash, or of chunks with a checksum; 0 if there is nothing to compare with.
        faults: what is wrong, one text for each file.
    """

    path: Path
    what: str
    checked: int
    faults: tuple[str, ...]


def verify(path: Path) -> Iterator[Verified]:
    """Check every recorded output at and below ``path``, and the distributed checkpoints that no record covers.

    All files are read. Such checkpoints are training state, models of other programs, and outputs of earlier releases,
    whose records have no hashes.

    Raises:
        ConfigError: if there is nothing that can be checked.
    """
    outputs = sorted(_outputs(path))
    hashed: list[Path] = []
    for output in outputs:
        record = read_record(output)
        if record is None:
            fault = f"{record_path(output)} cannot be read, or is damaged; remove it to make the output again"
            yield Verified(output, "record", 0, (fault,))
            continue
        files = record.get("files", {})
        hashed += [(output / name).absolute() for name in files]
        faults = damaged(output, files) if output.exists() else [f"{output} is gone"]
        yield Verified(output, str(record["stage"]), len(files), tuple(faults))
    known = set(hashed)
    stores = sorted(found.parent for found in _below(path, ".metadata") if found.absolute() not in known)
    if not outputs and not stores:
        raise ConfigError(
            f"{path}: holds no output of minitron and no distributed checkpoint; give an output, the directory of a "
            "run, or a checkpoint"
        )
    for store in stores:
        yield _checkpoint(store)


def show_verified(path: Path, console: Console) -> None:
    """Check what is at ``path`` and print a line for each output and checkpoint as it is done.

    Raises:
        ConfigError: if there is nothing to check.
        CheckpointError: if anything is damaged, with each file.
    """
    faults: list[str] = []
    with console.status("reading ...") if console.is_terminal else _Quiet():
        for done in verify(path):
            unit = "chunks" if done.what == "checkpoint" else "files"
            state = (
                "DAMAGED" if done.faults else f"{done.checked} {unit}" if done.checked else "nothing to compare with"
            )
            console.print(f"{done.what}  {done.path}: {state}", highlight=False, markup=False, soft_wrap=True)
            faults += done.faults
    if faults:
        raise CheckpointError("\n".join(faults))


def _checkpoint(directory: Path) -> Verified:
    from nemo_minitron.checkpoints.formats.torch_dist.reader import TorchDist
    from nemo_minitron.runtime.cpu.quiet import quiet

    quiet()
    try:
        store = TorchDist(directory)
    except CheckpointError as error:
        return Verified(directory, "checkpoint", 0, (str(error),))
    return Verified(directory, "checkpoint", store.count, tuple(store.damage()))


def _outputs(path: Path) -> Iterator[Path]:
    if record_path(path).exists():
        yield path
    for record in _below(path, "record.json"):
        if record.parent != path:
            yield record.parent
    suffix = ".nemo.record.json"
    for record in _below(path, f"*{suffix}"):
        yield record.with_name(record.name.removesuffix(".record.json"))


def _below(path: Path, name: str) -> Iterator[Path]:
    return (found for found in path.rglob(name) if found.is_file()) if path.is_dir() else iter(())


class _Quiet:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...
