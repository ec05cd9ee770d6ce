"""Reader and writer of Hugging Face checkpoints.

Such a checkpoint is a directory with ``config.json``, safetensors (or ``pytorch_model.bin``) and a tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron import axes
from nemo_minitron.accounting import warn_once
from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.formats.entry import WriteOptions
from nemo_minitron.checkpoints.formats.huggingface import generation, known
from nemo_minitron.checkpoints.formats.huggingface import names as naming
from nemo_minitron.checkpoints.formats.huggingface.beside import account_files
from nemo_minitron.checkpoints.formats.huggingface.config import from_hf, read_json, to_hf
from nemo_minitron.checkpoints.formats.huggingface.families import hf_family
from nemo_minitron.checkpoints.formats.huggingface.shards import ShardWriter
from nemo_minitron.checkpoints.formats.torch_dist.checksums import crc32
from nemo_minitron.checkpoints.model_record import read_model_record, write_model_record
from nemo_minitron.checkpoints.tokenizer.files import check_tokenizer, copy_tokenizer, find_tokenizer
from nemo_minitron.checkpoints.weights import CastWeights, dtype_name, writing_order
from nemo_minitron.errors import CheckpointError, first_line
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    import torch

__all__ = ["HFWeights", "describe_hf", "is_hf", "open_hf", "peek_hf", "write_hf"]

#: Where weights are looked for, in transformers' order (``modeling_utils._get_resolved_checkpoint_files``).
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


#: Bytes that are read of a file before it is opened anew.
_MAPPED = 32 * 2**20


def is_hf(path: Path) -> bool:
    """Whether a path is a HF directory."""
    return (path / "config.json").is_file()


def open_hf(path: Path) -> Checkpoint:
    """Open a HF directory. Reads headers only; tensors come later, one at a time.

    Raises:
        CheckpointError: missing or truncated file, foreign architecture, tensor that is absent, unexpected or of
            another shape than the configuration says, tokenizer that does not fit.
    """
    shape, architecture = from_hf(read_json(path / "config.json"), path / "config.json")
    if (path / generation.FILE_NAME).is_file():
        own = generation.read_generation(
            read_json(path / generation.FILE_NAME), path / generation.FILE_NAME, architecture
        )
        architecture = dataclasses.replace(architecture, generation=own)
    record = read_model_record(path)
    lineage: dict[str, Any] = {}
    if record is not None:
        if record.shape != shape:
            raise CheckpointError(
                f"{path}: minitron.json describes {record.shape} but config.json {shape}; "
                f"one of them was edited, restore it"
            )
        lineage = record.lineage
    first, tensors = _find_tensors(path)
    weights = HFWeights(
        path,
        shape,
        architecture.family,
        tensors,
        None if record is None else record.weights,
        {} if record is None else record.sums,
    )
    weights.check()
    account_files(path, first, set(tensors.values()))
    architecture = dataclasses.replace(architecture, dtype=weights.dtype())
    tokenizer = find_tokenizer(path)
    if tokenizer is not None:
        check_tokenizer(tokenizer, shape.vocab_size)
    return Checkpoint(shape, architecture, weights, tokenizer, path, "hf", lineage)


def describe_hf(path: Path, directory: Path) -> Checkpoint:
    """A HF directory by its small files: sizes, constants and tokenizer. Files of weights must be there, and are not
    compared with the sizes. ``directory`` is not used.

    Raises:
        CheckpointError: as :func:`open_hf`, for what the small files say.
    """
    shape, architecture = from_hf(read_json(path / "config.json"), path / "config.json")
    _, tensors = _find_tensors(path)
    tokenizer = find_tokenizer(path)
    if tokenizer is not None:
        check_tokenizer(tokenizer, shape.vocab_size)
    weights = HFWeights(path, shape, architecture.family, tensors)
    return Checkpoint(shape, architecture, weights, tokenizer, path, "hf")


def peek_hf(path: Path) -> tuple[int | None, Path | None]:
    """Rows of the vocabulary, and the directory of the tokenizer, as the small files of a HF directory say.

    Raises:
        CheckpointError: for a ``config.json`` that cannot be used.
    """
    shape, _ = from_hf(read_json(path / "config.json"), path / "config.json")
    return shape.vocab_size, find_tokenizer(path)


@dataclasses.dataclass(frozen=True)
class HFWeights:
    """Lazily read tensors of a HF directory under canonical names. Implements ``Weights``.

    Memory: safetensors are mapped, so a tensor that HF stores as one piece costs no copy until it is used; a merged
    tensor (QKV, gate/up) holds its parts and the result.

    Attributes:
        path: the directory.
        shape, family: the model's.
        files: HF tensor name -> file that holds it.
        content: hash of all tensors as they were written, if a model record says it.
        sums: CRC-32 of canonical tensors as they were written, as far as a model record says it. They are checked when
            a tensor is read for the first time.
    """

    path: Path
    shape: ModelShape
    family: str
    files: Mapping[str, Path]
    content: str | None = None
    sums: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def names(self) -> Sequence[str]:
        """Canonical names in the order of the forward pass."""
        return [entry.name for entry in axes.parameters(axes.family(self.family), self.shape)]

    def tensor(self, name: str) -> torch.Tensor:
        """The canonical tensor, in the stored dtype.

        Raises:
            CheckpointError: if one of its parts is missing, truncated, damaged, or of the wrong shape.
        """
        entry = axes.entry(axes.family(self.family), self.shape, name)
        of_expert = entry.row.expert if self._fused else None
        parts = []
        for part, expected in self._parts(entry).items():
            part_tensor = self._read(part, of_expert)
            if of_expert is not None:
                expected = expected[1:]
            if tuple(part_tensor.shape) != expected:
                raise _wrong_shape(self.files[part], part, tuple(part_tensor.shape), expected)
            parts.append(part_tensor)
        tensor = parts[0] if of_expert is not None else naming.merge(entry.row.axes, parts, entry.sizes)
        self._check_sum(name, tensor, next(iter(self._parts(entry))))
        return tensor

    def _check_sum(self, name: str, tensor: torch.Tensor, part: str) -> None:
        if name in self._sound or name not in self.sums:
            return
        import torch

        if crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) != self.sums[name]:
            raise CheckpointError(
                f"{self.files[part]}: {part} is not what was written (the checksum in minitron.json differs); restore "
                "the file, or remove minitron.json if another program has put other weights there"
            )
        self._sound.add(name)

    def check(self) -> None:
        """Compare the stored names and shapes with the configuration, from the headers alone.

        Raises:
            CheckpointError: naming the first tensors that do not agree.
        """
        table = axes.family(self.family)
        expected: dict[str, tuple[int, ...]] = {}
        for entry in axes.parameters(table, self.shape):
            expected |= self._parts(entry)
        if missing := [name for name in expected if name not in self.files]:
            raise CheckpointError(
                f"{self.path}: {len(missing)} tensors that config.json asks for are missing, "
                f"{_first(missing)}; the download is incomplete or the configuration is not this model's"
            )
        tied = naming.hf_names(self.family, table.output) if self.shape.tied_embeddings else ()
        unexpected = [
            name
            for name in self.files
            if name not in expected and name not in tied and not any(each.search(name) for each in known.TENSORS)
        ]
        if unexpected:
            raise CheckpointError(
                f"{self.path}: {len(unexpected)} tensors have no place in a {self.family} model of this configuration, "
                f"{_first(unexpected)}; check num_hidden_layers, and that it has no biases but its family's"
            )
        headers = self._headers
        if missing := [name for name in expected if name not in headers]:
            raise CheckpointError(
                f"{self.path}: the index places {len(missing)} tensors in files that do not hold them, "
                f"{_first(missing)}; the files and the index are of two models, fetch them again"
            )
        if unlisted := [name for name in headers if name not in self.files]:
            raise CheckpointError(
                f"{self.path}: {len(unlisted)} tensors are in the files but not in the index, {_first(unlisted)}; "
                f"the files and the index are of two models, fetch them again"
            )
        for name, (shape, _) in headers.items():
            if name in expected and shape != expected[name]:
                raise _wrong_shape(self.files[name], name, shape, expected[name])
        if tied and tied[0] in self.files:
            self._check_tied(tied[0])

    @cached_property
    def _opened(self) -> dict[Path, tuple[Any, int]]:
        """The file that was read last, and how many bytes were read of it."""
        return {}

    @cached_property
    def _sound(self) -> set[str]:
        """The tensors whose checksums are right."""
        return set()

    @cached_property
    def _fused(self) -> bool:
        """Whether all experts of a layer are one tensor."""
        table = axes.family(self.family)
        known = hf_family(self.family).fused
        return any(f"model.layers.0.{known[name]}" in self.files for name in table.expert if name in known)

    def _parts(self, entry: axes.Entry) -> dict[str, tuple[int, ...]]:
        return (naming.fused_parts if self._fused else naming.hf_parts)(self.family, entry)

    def _check_tied(self, output: str) -> None:
        """Hold an output layer that is stored beside tied embeddings against them, by some rows."""
        embedding = next(iter(axes.family(self.family).first))
        here, there = (self._some_rows(name) for name in (output, *naming.hf_names(self.family, embedding)))
        if here.shape != there.shape or not bool((here == there).all()):
            raise CheckpointError(
                f"{self.files[output]}: {output} is another matrix than the embedding, but config.json ties the two "
                f"(tie_word_embeddings); set it to false, or remove the tensor"
            )

    def _some_rows(self, name: str, count: int = 64) -> torch.Tensor:
        """Rows of a matrix, evenly over it."""
        file = self.files[name]
        if file.suffix != ".safetensors":
            tensor = self._torch(file)[name]
            return tensor[:: max(1, len(tensor) // count)]
        import torch

        with _safe_open(file) as handle:
            part = handle.get_slice(name)
            step = max(1, part.get_shape()[0] // count)
            return torch.cat([part[row : row + 1] for row in range(0, part.get_shape()[0], step)])

    def dtype(self) -> str:
        """The dtype that holds all stored tensors."""
        return dtype_name([dtype for _, dtype in self._headers.values()], str(self.path))

    @cached_property
    def _headers(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """HF name -> shape and dtype, without reading data."""
        import torch

        stored = {
            "F64": torch.float64,
            "F32": torch.float32,
            "F16": torch.float16,
            "BF16": torch.bfloat16,
            "F8_E4M3": torch.float8_e4m3fn,
            "F8_E5M2": torch.float8_e5m2,
            "I8": torch.int8,
            "U8": torch.uint8,
            "I32": torch.int32,
            "I64": torch.int64,
        }
        out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for file in dict.fromkeys(self.files.values()):
            if file.suffix == ".safetensors":
                with _safe_open(file) as handle:
                    for name in handle.keys():  # noqa: SIM118 (not a dict)
                        part = handle.get_slice(name)
                        if part.get_dtype() not in stored:
                            raise CheckpointError(f"{file}: {name} has dtype {part.get_dtype()}, not supported")
                        out[name] = (tuple(part.get_shape()), stored[part.get_dtype()])
            else:
                out |= {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in _torch_load(file).items()}
        return out

    def _torch(self, file: Path) -> dict[str, torch.Tensor]:
        """The tensors of a ``.bin``; one that cannot be mapped is read once."""
        if zipfile.is_zipfile(file):
            return _torch_load(file)
        if file not in self._unmapped:
            self._unmapped.clear()
            self._unmapped[file] = _torch_load(file)
        return self._unmapped[file]

    @cached_property
    def _unmapped(self) -> dict[Path, dict[str, torch.Tensor]]:
        """The file of torch before 1.6 that was read last."""
        return {}

    def stored(self, name: str) -> torch.Tensor:
        """A tensor under its name in the files, as it is there.

        Raises:
            CheckpointError: if it is missing.
        """
        return self._read(name)

    def _read(self, name: str, index: int | None = None) -> torch.Tensor:
        """A tensor, or one element of its first dimension."""
        if name not in self.files:
            raise CheckpointError(f"{self.path} has no tensor {name}; the checkpoint is incomplete")
        file = self.files[name]
        if file.suffix != ".safetensors":
            tensor = self._torch(file)[name]
            return tensor if index is None else tensor[index]
        handle, read = self._opened.pop(file, (None, 0))
        if handle is None or read > _MAPPED:
            # An opening reads the whole header, and a mixture has thousands of tensors in it. An open file keeps the
            # pages that were read.
            self._opened.clear()
            handle, read = _safe_open(file), 0
        one = None if index is None else slice(index, index + 1)
        tensor = handle.get_tensor(name) if one is None else handle.get_slice(name)[one].squeeze(0)
        self._opened[file] = handle, read + tensor.nbytes
        return tensor


def write_hf(checkpoint: Checkpoint, directory: Path, options: WriteOptions) -> None:
    """Write a HF directory into ``directory`` (which this creates; callers write aside).

    Tensors are read, split and written one after the other, those outside the layers first, so that one tensor is held
    at a time, whatever the size of a file.

    Raises:
        CheckpointError: if transformers does not have the family, or not with layers that differ in size.
    """
    dtype, progress = options.dtype, options.progress
    shape, table = checkpoint.shape, checkpoint.family
    config = to_hf(shape, checkpoint.architecture, dtype=dtype)
    directory.mkdir(parents=True)
    weights = CastWeights(checkpoint.weights, dtype)
    expected = writing_order(checkpoint.architecture, shape)
    entries = {name: axes.entry(table, shape, name) for name in expected}
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries.values():
        shapes |= naming.hf_parts(table.name, entry)
    with ShardWriter(directory, shapes, dtype, options.max_shard_bytes) as shards:
        for index, (name, entry) in enumerate(entries.items()):
            tensor = weights.tensor(name)
            if tuple(tensor.shape) != expected[name]:
                raise _wrong_shape(checkpoint.path, name, tuple(tensor.shape), expected[name])
            parts = naming.split(entry.row.axes, tensor, entry.sizes)
            for part_name, part in zip(naming.hf_names(table.name, name), parts, strict=True):
                shards.write(part_name, part)
            del tensor, parts, part
            if progress is not None:
                progress(name, index + 1, len(expected))
    _write_json(directory / "config.json", config)
    _write_json(directory / generation.FILE_NAME, generation.generation_config(checkpoint.architecture))
    if checkpoint.tokenizer is not None:
        check_tokenizer(checkpoint.tokenizer, shape.vocab_size)
        copy_tokenizer(checkpoint.tokenizer, directory)
    write_model_record(checkpoint, directory, dtype=dtype, form="hf", weights=weights.content(), sums=weights.sums)


def _find_tensors(path: Path) -> tuple[Path, dict[str, Path]]:
    """The first of :data:`WEIGHTS` that is there, and by it HF tensor name -> file."""
    name = next((name for name in WEIGHTS if (path / name).is_file()), None)
    if name is None:
        raise CheckpointError(f"{path} has a config.json but no weights; expected {', '.join(WEIGHTS)}")
    if name.endswith(".safetensors"):
        with _safe_open(path / name, framework="numpy") as handle:  # names alone, which need no torch
            return path / name, dict.fromkeys(handle.keys(), path / name)
    if name.endswith(".bin"):
        return path / name, dict.fromkeys(_torch_load(path / name), path / name)
    places = read_json(path / name).get("weight_map")
    if not isinstance(places, dict):
        raise CheckpointError(f"{path / name} has no weight_map; restore the file")
    files = {tensor: path / str(file) for tensor, file in places.items()}
    for file in dict.fromkeys(files.values()):
        if file.parent != path:
            raise CheckpointError(f"{path / name} names {file}, which lies outside the checkpoint")
        if not file.is_file():
            raise CheckpointError(f"{file} is missing ({name} names it); the download is incomplete")
    return path / name, files


def _safe_open(file: Path, framework: str = "pt") -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework=framework, device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or not a safetensors file ({error}); fetch it again") from error


def _torch_load(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a ``.bin``, mapped, never unpickled beyond tensors."""
    import torch

    try:
        # Before torch 1.6 a file was no zip archive, and such a file cannot be mapped.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # on damaged bytes torch's unpickler fails in any way, IndexError among them
        reason = first_line(error)
        raise CheckpointError(
            f"{file} is truncated or holds more than tensors ({reason}); "
            f"fetch it again, or convert it to safetensors where it was made"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds {type(content).__name__} where tensors by name are needed; save it again")
    tensors = {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}
    if len(tensors) < len(content):
        other = ", ".join(str(name) for name in content if name not in tensors)
        warn_once(file, f"entries that are no tensors are left behind: {other}")
    return tensors


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _wrong_shape(where: Path, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{where}: {name} has shape {list(shape)} where the model's sizes ask for {list(expected)}; "
        f"the configuration belongs to another model"
    )


def _first(names: list[str]) -> str:
    return "such as " + ", ".join(names[:3])
