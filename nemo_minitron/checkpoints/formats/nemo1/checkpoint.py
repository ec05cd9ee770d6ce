"""Reader and writer of ``.nemo`` files (NeMo 1, NeMo-Aligner).

Such a file is a tar of ``model_config.yaml``, ``model_weights/`` and the tokenizer.

The tensors are read in place, by their offset in the tar; nothing is unpacked but the small tokenizer files. Every
member is checked before any is used. A ``.nemo`` that was unpacked into a directory opens the same way.

Tokenizer: NeMo 1 hands ``tokenizer.type`` to transformers as it stands, and has no way to point a Hugging Face
tokenizer into the archive (its artifacts are single files, and ``type`` is not one of them). The files are carried as
``nemo_tokenizer/`` and ``type`` is that relative path: whoever restores the model unpacks the directory and overrides
``tokenizer.type`` with its place (:func:`unpack_nemo1` does both).
"""

from __future__ import annotations

import atexit
import io
import shutil
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.formats.entry import WriteOptions
from nemo_minitron.checkpoints.formats.nemo1.config import from_nemo1, to_nemo1
from nemo_minitron.checkpoints.formats.nemo1.window import Window
from nemo_minitron.checkpoints.formats.nemo_common import COMMON, padded, parse_yaml
from nemo_minitron.checkpoints.model_record import FILE_NAME, parse_model_record, write_model_record
from nemo_minitron.checkpoints.tokenizer.files import check_tokenizer, copy_tokenizer, find_tokenizer, token_count
from nemo_minitron.checkpoints.tokenizer.names import is_tokenizer_file
from nemo_minitron.errors import CheckpointError
from nemo_minitron.shape import require_uniform

__all__ = ["TOKENIZER", "Archive", "is_nemo1", "open_nemo1", "unpack_nemo1", "write_nemo1"]

CONFIG = "model_config.yaml"
WEIGHTS = "model_weights"
TOKENIZER = "nemo_tokenizer"
LARGEST_SMALL_FILE = 512 * 2**20
"""Bytes that a configuration or tokenizer file may have; more is no such file."""


class Archive:
    """The members of a ``.nemo`` (or of a directory that one was unpacked into), by their path inside.

    Raises:
        CheckpointError: if it is no tar, is truncated, or has a forbidden member: an absolute path, a
            path with ``..``, a link, a device, a name twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}  # name -> offset and size in the tar
        if path.is_dir():
            self._files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
            return
        self._files = {}
        size = path.stat().st_size
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    self._add(member, size)
        except tarfile.TarError as error:
            with open(path, "rb") as file:
                gzipped = file.read(2) == b"\x1f\x8b"
            if gzipped:
                raise CheckpointError(
                    f"{path} is a compressed .nemo; unpack it (tar xzf) into a directory and open that"
                ) from error
            raise CheckpointError(f"{path} is truncated or not a .nemo archive ({error})") from error

    def names(self) -> list[str]:
        """Paths of all files inside, with ``/``."""
        return [*self._places, *self._files]

    def open(self, name: str) -> BinaryIO:
        """A file inside, for reading at any position.

        Raises:
            FileNotFoundError: if it is not there.
        """
        if name in self._files:
            return open(self._files[name], "rb")
        if name not in self._places:
            raise FileNotFoundError(f"{name} in {self.path}")
        start, size = self._places[name]
        return io.BufferedReader(Window(self.path, start, size))

    def read(self, name: str) -> bytes:
        """The content of a small file inside.

        Raises:
            CheckpointError: if it is missing or far too large.
        """
        try:
            with self.open(name) as file:
                data = file.read(LARGEST_SMALL_FILE + 1)
        except FileNotFoundError:
            raise CheckpointError(f"{self.path} holds no {name}; it is not a whole .nemo") from None
        if len(data) > LARGEST_SMALL_FILE:
            raise CheckpointError(f"{self.path}: {name} has more than {LARGEST_SMALL_FILE} bytes, it is no such file")
        return data

    def _add(self, member: tarfile.TarInfo, size: int) -> None:
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts:
            raise CheckpointError(f"{self.path}: member {member.name!r} leads outside the archive; refused")
        if member.isdir():
            return
        if not member.isreg() or member.sparse is not None:
            raise CheckpointError(
                f"{self.path}: member {member.name!r} is a link, a device or sparse; a .nemo holds plain files only"
            )
        if name.as_posix() in self._places:
            raise CheckpointError(f"{self.path}: member {member.name!r} is there twice; refused")
        if member.offset_data + member.size > size:
            raise CheckpointError(f"{self.path} ends inside {member.name!r}; it is truncated, restore it")
        self._places[name.as_posix()] = (member.offset_data, member.size)


def is_nemo1(path: Path) -> bool:
    """Whether a path is a ``.nemo`` file, or a directory that one was unpacked into."""
    return (path.suffix == ".nemo" and path.is_file()) or (path / CONFIG).is_file()


def open_nemo1(path: Path) -> Checkpoint:
    """Open a ``.nemo`` file that this suite or NeMo wrote. Tensors are read later, one at a time, in place.

    Tokenizer files are copied to a temporary directory that lives as long as the process.

    Raises:
        CheckpointError: an archive that is truncated or unsafe, a missing part, weights that are not a distributed
            checkpoint, a foreign architecture, sizes that do not fit the tensors, a tokenizer that does not fit.
    """
    from nemo_minitron.checkpoints.formats.torch_dist.reader import TorchDist, checkpoint_of

    archive = Archive(path)
    names = archive.names()
    config = parse_yaml(archive.read(CONFIG), path / CONFIG)
    if f"{WEIGHTS}/.metadata" not in names:
        held = [name for name in names if name.startswith(("model_weights", "mp_rank", "tp_rank"))]
        raise CheckpointError(
            f"{path} holds no distributed checkpoint ({', '.join(held[:3]) or 'no weights at all'}); "
            f"restore it with the NeMo release that wrote it and save it again with mcore_gpt: true"
        )
    tokenizer = _unpack_tokenizer(archive, config)
    store = TorchDist(path / WEIGHTS, lambda name: archive.open(f"{WEIGHTS}/{name}"))
    return checkpoint_of(
        store,
        parse_model_record(archive.read(FILE_NAME), path / FILE_NAME) if FILE_NAME in names else None,
        lambda rows: from_nemo1(config, path / CONFIG, rows, tokenizer),
        tokenizer=tokenizer,
        path=path,
        form="nemo",
    )


def write_nemo1(checkpoint: Checkpoint, file: Path, options: WriteOptions) -> None:
    """Write a ``.nemo`` to ``file`` (callers write aside).

    The parts are collected in ``options.scratch`` first, so the disk holds the model
    twice for a moment; memory holds one layer and one embedding.

    Raises:
        CheckpointError: if there is no tokenizer (NeMo 1 cannot restore without one) or it does not fit, or if NeMo 1
            cannot hold the family.
        ShapeError: if layers differ in size.
    """
    from nemo_minitron.checkpoints.formats.torch_dist.writer import write_torch_dist

    require_uniform(checkpoint.shape, "the nemo format")
    if checkpoint.tokenizer is None:
        raise CheckpointError(
            f"{checkpoint.path} carries no tokenizer, and NeMo cannot restore a .nemo without one; "
            f"put the tokenizer's files beside the weights, or write the nemo2 format"
        )
    shape, files = checkpoint.shape, options.scratch
    dtype, vocab_multiple, progress = options.dtype, options.vocab_multiple, options.progress
    check_tokenizer(checkpoint.tokenizer, shape.vocab_size)
    rows = padded(shape.vocab_size, vocab_multiple)
    fixed = None if token_count(checkpoint.tokenizer) == shape.vocab_size else rows
    config = to_nemo1(shape, checkpoint.architecture, dtype=dtype, multiple=vocab_multiple, rows=fixed)
    files.mkdir(parents=True)
    content = write_torch_dist(
        checkpoint, files / WEIGHTS, prefix="model.", dtype=dtype, vocab_rows=rows, common=COMMON, progress=progress
    )
    copy_tokenizer(checkpoint.tokenizer, files / TOKENIZER)
    (files / CONFIG).write_text(config, encoding="utf-8")
    write_model_record(checkpoint, files, dtype=dtype, form="nemo", weights=content)
    with tarfile.open(file, "w:", format=tarfile.PAX_FORMAT) as tar:
        # the configuration first, so that it is found without reading past the weights
        for entry in sorted(files.iterdir(), key=lambda entry: (entry.is_dir(), entry.name == WEIGHTS, entry.name)):
            tar.add(entry, arcname=f"./{entry.name}", filter=_anonymous)
    shutil.rmtree(files)


def unpack_nemo1(path: Path, directory: Path) -> dict[str, Any]:
    """Unpack a ``.nemo`` into ``directory`` for NeMo's ``restore_from`` (``model_extracted_dir``).

    Returns:
        The content of its ``model_config.yaml`` with ``tokenizer.type`` pointing at the unpacked tokenizer.

    Raises:
        CheckpointError: as :class:`Archive`.
    """
    archive = Archive(path)
    for name in archive.names():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(name) as source, open(target, "wb") as out:
            shutil.copyfileobj(source, out, 16 * 2**20)
    config = parse_yaml((directory / CONFIG).read_bytes(), path / CONFIG)
    if (directory / TOKENIZER).is_dir():
        config["tokenizer"]["type"] = str(directory / TOKENIZER)
    return config


def _unpack_tokenizer(archive: Archive, config: dict[str, Any]) -> Path | None:
    """Copy the tokenizer's known files out of the archive; None where it carries none.

    NeMo's own archives hold a sentencepiece model as an artifact that ``tokenizer.model`` names as ``nemo:<file>``.
    """
    inside = [name.removeprefix(f"{TOKENIZER}/") for name in archive.names() if name.startswith(f"{TOKENIZER}/")]
    wanted = {f"{TOKENIZER}/{name}": name for name in inside if is_tokenizer_file(name)}
    described = config.get("tokenizer")
    artifact = described.get("model") if isinstance(described, dict) else None
    if isinstance(artifact, str) and artifact.startswith("nemo:"):
        wanted[artifact.removeprefix("nemo:")] = "tokenizer.model"
    present = [name for name in archive.names() if name in wanted]
    if not present:
        return None
    directory = Path(tempfile.mkdtemp(prefix="nemo_minitron_tokenizer_"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    for name in present:
        (directory / wanted[name]).parent.mkdir(exist_ok=True)
        (directory / wanted[name]).write_bytes(archive.read(name))
    return find_tokenizer(directory)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Remove the writer's user from a member of the archive."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member
