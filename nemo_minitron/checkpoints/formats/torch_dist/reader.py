"""Reading Megatron's ``torch_dist`` distributed checkpoints: no process group, no Megatron, one region at a time.

A checkpoint is a set of ``*.distcp`` files that hold chunks, each a ``torch.save``d tensor, and ``.metadata``, which
says for every key its global shape and for every chunk its offsets and its place in a file. Two layouts of decoder
layers exist (``megatron.core.transformer.transformer_block.TransformerBlock.sharded_state_dict``): homogeneous,
one key ``decoder.layers.<rest>`` with a leading layer dimension, and one key a layer. Keys may carry a prefix:
``module.`` (NeMo 2) or ``model.`` (``.nemo``). Optimizer state and ``_extra_state`` are passed over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from nemo_minitron import axes
from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.formats.nemo1.window import Window
from nemo_minitron.checkpoints.formats.torch_dist.checksums import SummedWindow, damage
from nemo_minitron.checkpoints.formats.torch_dist.metadata import read_metadata
from nemo_minitron.checkpoints.model_record import ModelRecord
from nemo_minitron.checkpoints.tokenizer.files import check_tokenizer
from nemo_minitron.checkpoints.weights import dtype_name
from nemo_minitron.errors import CheckpointError, first_line
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    import torch

__all__ = ["PREFIXES", "TorchDist", "TorchDistWeights"]

PREFIXES = ("module.", "model.", "")
_EXPERTS = "mlp.experts.experts."
_NORMS = (
    # a model built from Megatron's local layer spec may keep its norms outside the linears, and in a mixture it names
    # the norm before the router as if the router were a linear
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
)


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """One stored piece of a tensor: where it lies in the tensor and where in which file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class TorchDist:
    """An opened distributed checkpoint: the table of its tensors.

    Args:
        directory: that holds ``.metadata``; also names the checkpoint in messages.
        open_file: how to open one of its files for reading; by default from ``directory``.

    Raises:
        CheckpointError: if the metadata cannot be read.
    """

    def __init__(self, directory: Path, open_file: Callable[[str], BinaryIO] | None = None) -> None:
        self.directory = directory
        self._open = open_file or (lambda name: open(directory / name, "rb"))  # noqa: SIM115 (closed by the caller)
        metadata = read_metadata(directory, self._open)
        self.sizes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._chunks: dict[str, list[_Chunk]] = {}
        self._stacks: dict[str, tuple[int, dict[tuple[int, ...], list[_Chunk]]]] = {}
        self._incomplete: set[str] = set()  # keys of which a chunk has no place in any file
        self._sound: set[_Chunk] = set()  # whose checksums are right; a chunk may be read many times, in parts
        try:
            self._fill(metadata)
        except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
            reason = first_line(error)
            raise CheckpointError(f"{directory / '.metadata'} is damaged ({reason}); restore the file") from error
        for name in {chunk.file for chunks in self._chunks.values() for chunk in chunks}:
            if Path(name).name != name:
                raise CheckpointError(f"{directory}: .metadata names {name!r}, which lies outside the checkpoint")

    def _fill(self, metadata: Any) -> None:
        """The tables of tensors and chunks. A flipped bit may leave any value in any field of the pickle."""
        import torch
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        stored_at: dict[str, dict[tuple[int, ...], Any]] = {}
        for index, info in metadata.storage_data.items():
            if stored_at.setdefault(index.fqn, {}).setdefault(tuple(index.offset or ()), info) is not info:
                raise ValueError(f"{index} is stored in two places")
        for key, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                continue
            size, dtype = _counts(entry.size), entry.properties.dtype
            if not isinstance(key, str) or not isinstance(dtype, torch.dtype):
                raise ValueError(f"{key!r} has the dtype {dtype!r}")
            stored = stored_at.get(key, {})
            chunks = []
            for chunk in entry.chunks:
                offsets, sizes = _counts(chunk.offsets), _counts(chunk.sizes)
                ends = [offset + length for offset, length in zip(offsets, sizes, strict=True)]
                if any(end > length for end, length in zip(ends, size, strict=True)):
                    raise ValueError(f"a chunk of {key} lies outside its tensor")
                if (info := stored.get(offsets)) is None:
                    self._incomplete.add(key)
                else:
                    chunks.append(_Chunk(offsets, sizes, str(info.relative_path), *_counts((info.offset, info.length))))
            self.sizes[key], self.dtypes[key], self._chunks[key] = size, dtype, chunks
        places = [(chunk.file, chunk.start) for chunks in self._chunks.values() for chunk in chunks]
        if twice := [place for place, count in Counter(places).items() if count > 1]:
            raise ValueError(f"several chunks have one place, {twice[0]}")

    def prefix(self, name: str) -> str:
        """The prefix under which this checkpoint stores the model, found from a tensor that every model has.

        Raises:
            CheckpointError: if it is not there under any known prefix.
        """
        for prefix in PREFIXES:
            if prefix + name in self.sizes:
                return prefix
        raise CheckpointError(
            f"{self.directory} holds no {name}; it is not a GPT model's checkpoint "
            f"(found {', '.join(sorted(self.sizes)[:3]) or 'no tensors'})"
        )

    def read(self, key: str, region: Sequence[slice]) -> torch.Tensor:
        """A region of a stored tensor, assembled from its chunks; dimensions are kept.

        Memory: the region, and one chunk at a time.

        Args:
            key: stored key.
            region: one ``slice(start, stop)`` a dimension.

        Raises:
            CheckpointError: if a chunk is missing, truncated, or the chunks do not cover the region.
        """
        import torch

        if key not in self.sizes:
            raise CheckpointError(f"{self.directory} has no tensor {key}; the checkpoint is incomplete")
        if key in self._incomplete:
            raise CheckpointError(f"{self.directory}: a chunk of {key} is in no file; the checkpoint is incomplete")
        lengths = [part.stop - part.start for part in region]
        out: torch.Tensor | None = None
        covered = 0
        for chunk in self._near(key, region):
            overlap = [
                (max(part.start, offset), min(part.stop, offset + size))
                for part, offset, size in zip(region, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(start >= stop for start, stop in overlap):
                continue
            data = self._load(key, chunk)
            inner = tuple(
                slice(start - offset, stop - offset)
                for (start, stop), offset in zip(overlap, chunk.offsets, strict=True)
            )
            piece = data[inner]
            if list(piece.shape) == lengths:
                return piece
            if out is None:
                out = torch.empty(lengths, dtype=self.dtypes[key])
            outer = tuple(
                slice(start - part.start, stop - part.start)
                for (start, stop), part in zip(overlap, region, strict=True)
            )
            out[outer] = piece
            covered += piece.numel()
        if out is None or covered != out.numel():
            raise CheckpointError(
                f"{self.directory}: the chunks of {key} cover {covered} of the {_product(lengths)} elements asked for; "
                f"the checkpoint is incomplete"
            )
        return out

    @property
    def count(self) -> int:
        """Number of stored chunks."""
        return sum(len(chunks) for chunks in self._chunks.values())

    def damage(self, share: int = 0, shares: int = 1) -> Iterator[str]:
        """Read every chunk, of the optimizer's state too, and name those that differ from their checksums.

        Args:
            share: which part of the chunks to read, of
            shares: as many.
        """
        every = [(key, chunk) for key, chunks in self._chunks.items() for chunk in chunks]
        for key in sorted(self._incomplete):
            yield f"{self.directory}: a chunk of {key} is in no file"
        for key, chunk in every[share::shares]:
            where = f"{self.directory / chunk.file}, tensor {key}"
            try:
                with self._open(chunk.file) as file:
                    fault = damage(Window(file, chunk.start, chunk.length))
            except (OSError, KeyError) as error:
                fault = f"the file cannot be read: {error}"
            if fault is not None:
                yield f"{where}: the stored chunk is damaged ({fault})"

    def _near(self, key: str, region: Sequence[slice]) -> Sequence[_Chunk]:
        """The chunks of a key that may overlap a region; of stacked layers and experts, those of one of them alone.

        Where all chunks have one element of the first dimensions they are looked up by these, so that reading a mixture
        expert by expert does not go through all chunks for each.
        """
        if key not in self._stacks:
            chunks, depth = self._chunks[key], 0
            while chunks and depth < len(region) and all(chunk.sizes[depth] == 1 for chunk in chunks):
                depth += 1
            places: dict[tuple[int, ...], list[_Chunk]] = {}
            for chunk in chunks:
                places.setdefault(chunk.offsets[:depth], []).append(chunk)
            self._stacks[key] = depth, places
        depth, places = self._stacks[key]
        if any(part.stop - part.start != 1 for part in region[:depth]):
            return self._chunks[key]
        return places.get(tuple(part.start for part in region[:depth]), [])

    def _load(self, key: str, chunk: _Chunk) -> torch.Tensor:
        import torch

        where = f"{self.directory / chunk.file}, tensor {key}"
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(self._open(chunk.file))
                length = file.seek(0, io.SEEK_END)
            except (OSError, KeyError) as error:
                raise CheckpointError(f"{where}: the file cannot be read ({error}); restore it") from error
            if length < chunk.start + chunk.length:
                raise CheckpointError(f"{where}: the file ends early; it is truncated, restore it")
            sound = chunk in self._sound
            window = (Window if sound else SummedWindow)(file, chunk.start, chunk.length)
            try:
                tensor = torch.load(window, map_location="cpu", weights_only=True)
            except Exception as error:  # on damaged bytes torch's unpickler fails in any way, IndexError among them
                reason = first_line(error)
                raise CheckpointError(f"{where}: the stored chunk is damaged ({reason}); restore the file") from error
            if not isinstance(tensor, torch.Tensor):
                raise CheckpointError(
                    f"{where}: the chunk holds {type(tensor).__name__}, not a tensor; restore the file"
                )
            if not sound:
                fault = damage(window)
                if fault is not None:
                    raise CheckpointError(f"{where}: the stored chunk is damaged ({fault}); restore the file")
                self._sound.add(chunk)
        if tuple(tensor.shape) != chunk.sizes:
            raise CheckpointError(f"{where}: the chunk holds {list(tensor.shape)}, .metadata says {list(chunk.sizes)}")
        if tensor.dtype != self.dtypes[key]:
            raise CheckpointError(f"{where}: the chunk is {tensor.dtype}, .metadata says {self.dtypes[key]}")
        return tensor


@dataclasses.dataclass(frozen=True)
class TorchDistWeights:
    """A model's tensors in a distributed checkpoint under canonical names. Implements ``Weights``.

    Attributes:
        store: the checkpoint.
        shape, family: the model's; ``shape.vocab_size`` is the true vocabulary, stored rows beyond it are padding.
        prefix: before every key.
        content: hash of all tensors as they were written, if a model record says it.
    """

    store: TorchDist
    shape: ModelShape
    family: str
    prefix: str
    content: str | None = None

    def names(self) -> Sequence[str]:
        """Canonical names in the order of the forward pass."""
        return [entry.name for entry in axes.parameters(axes.family(self.family), self.shape)]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in the stored dtype, padding rows stripped."""
        key, place = self._locate(name)
        size = axes.entry(axes.family(self.family), self.shape, name).shape
        region = [slice(0, length) for length in size]
        values = self.store.read(key, [*(slice(index, index + 1) for index in place), *region])
        return values.reshape(size).contiguous()

    def check(self) -> None:
        """Compare the stored keys and global shapes with the model's sizes, without reading tensors.

        Raises:
            CheckpointError: for a tensor that is missing, of another shape, or has no place in the model.
        """
        table, known = axes.family(self.family), set()
        for entry in axes.parameters(table, self.shape):
            key, place = self._locate(entry.name)
            known.add(key)
            row, expected = entry.row, entry.shape
            stacked, size = self.store.sizes[key][: len(place)], self.store.sizes[key][len(place) :]
            layers, experts = ("layers", self.shape.num_layers), ("experts", self.shape.num_moe_experts)
            together = row.expert is not None and axes.EXPERTS not in key
            counts = [layers, experts][2 - len(place) :] if together else [layers][: len(place)]
            for (what, count), stored in zip(counts, stacked, strict=True):
                if stored != count:
                    raise self._mismatch(key, f"{stored} {what}", f"{count}")
            padded = row.axes[0] is axes.Axis.VOCAB and size[:1] >= expected[:1]
            if size[1:] != expected[1:] or (size[:1] != expected[:1] and not padded):
                raise self._mismatch(key, f"shape {list(size)}", f"{list(expected)}")
        for key in self._model_keys():
            if key not in known and not (self.shape.tied_embeddings and key == self.prefix + table.output):
                raise CheckpointError(
                    f"{self.store.directory}: {key} has no place in a {table.name} model of {self.shape.num_layers} "
                    f"layers; the configuration belongs to another model"
                )

    def padded_vocab(self) -> int:
        """Stored rows of the embedding."""
        return self.store.sizes[self.prefix + next(iter(axes.family(self.family).first))][0]

    def dtype(self) -> str:
        """The dtype that holds all of the model's tensors."""
        keys = dict.fromkeys(self._locate(name)[0] for name in self.names())
        return dtype_name([self.store.dtypes[key] for key in keys], str(self.store.directory))

    def _model_keys(self) -> Iterator[str]:
        for key in self.store.sizes:
            if key.startswith(self.prefix) and not key.endswith("_extra_state"):
                rest = key.removeprefix(self.prefix)
                if rest.startswith(("decoder.", "embedding.", "output_layer.")):
                    yield key

    def _locate(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Canonical name -> stored key, and the place along its leading dimensions: of the layer, of the expert."""
        layer, expert, below = axes.name_parts(name)
        if layer is None:
            if self.prefix + name in self.store.sizes:
                return self.prefix + name, ()
        else:
            place = () if expert is None else (expert,)
            for spelling in _spellings(below if expert is None else _EXPERTS + below):
                if (key := f"{self.prefix}decoder.layers.{spelling}") in self.store.sizes:
                    return key, (layer, *place)
                if (key := f"{self.prefix}decoder.layers.{layer}.{spelling}") in self.store.sizes:
                    return key, place
            # by the names that experts have as modules, a key each
            for key, alone in (
                (f"{self.prefix}{name}", ()),
                (f"{self.prefix}decoder.layers.{axes.EXPERTS}{expert}.{below}", (layer,)),
            ):
                if expert is not None and key in self.store.sizes:
                    return key, alone
        raise CheckpointError(
            f"{self.store.directory} has no tensor {self.prefix}{name}; the checkpoint is incomplete "
            f"or has fewer layers than its configuration says"
        )

    def _mismatch(self, key: str, actual: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.store.directory}: {key} has {actual} where the model's sizes ask for {expected}; "
            f"the configuration belongs to another model"
        )


def _spellings(rest: str) -> Iterator[str]:
    yield rest
    for fused, alone in _NORMS:
        for present, other in ((fused, alone), (alone, fused)):
            if rest.startswith(present):
                yield other + rest.removeprefix(present)


def _counts(values: Sequence[Any]) -> tuple[int, ...]:
    """Sizes or offsets, checked."""
    if any(not isinstance(value, int) or value < 0 for value in values):
        raise ValueError(f"{list(values)} are no sizes")
    return tuple(values)


def _product(lengths: Sequence[int]) -> int:
    count = 1
    for length in lengths:
        count *= length
    return count


def checkpoint_of(
    store: TorchDist,
    record: ModelRecord | None,
    describe: Callable[[int], tuple[ModelShape, Architecture]],
    *,
    tokenizer: Path | None,
    path: Path,
    form: str,
) -> Checkpoint:
    """A checkpoint of a NeMo format over its open weights; sizes from ``minitron.json`` or NeMo's description, checked.

    Args:
        store: the weights.
        record: ``minitron.json`` of the checkpoint, if it has one.
        describe: from the number of vocabulary rows to what NeMo's own description says; called without a record.
        tokenizer, path, form: as in :class:`~nemo_minitron.checkpoints.base.Checkpoint`.

    Raises:
        CheckpointError: if weights, description and tokenizer do not fit each other.
    """
    prefix = store.prefix("embedding.word_embeddings.weight")
    lineage: dict[str, Any] = {}
    if record is not None:
        shape, architecture, lineage = record.shape, record.architecture, record.lineage
    else:
        shape, architecture = describe(store.sizes[prefix + "embedding.word_embeddings.weight"][0])
    weights = TorchDistWeights(store, shape, architecture.family, prefix, None if record is None else record.weights)
    weights.check()
    architecture = dataclasses.replace(architecture, dtype=weights.dtype())
    if tokenizer is not None:
        check_tokenizer(tokenizer, shape.vocab_size)
    return Checkpoint(shape, architecture, weights, tokenizer, path, form, lineage)
