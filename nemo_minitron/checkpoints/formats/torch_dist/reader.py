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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from nemo_minitron import axes
from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.formats.nemo1.window import Window
from nemo_minitron.checkpoints.formats.torch_dist.metadata import read_metadata
from nemo_minitron.checkpoints.model_record import ModelRecord
from nemo_minitron.checkpoints.tokenizer.files import check_tokenizer
from nemo_minitron.checkpoints.weights import dtype_name
from nemo_minitron.errors import CheckpointError
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
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self.directory = directory
        self._open = open_file or (lambda name: open(directory / name, "rb"))  # noqa: SIM115 (closed by the caller)
        metadata = read_metadata(directory, self._open)
        places: dict[str, dict[tuple[int, ...], Any]] = {}
        for index, info in metadata.storage_data.items():
            places.setdefault(index.fqn, {})[tuple(index.offset or ())] = info
        self.sizes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._chunks: dict[str, list[_Chunk]] = {}
        for key, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                continue
            self.sizes[key] = tuple(entry.size)
            self.dtypes[key] = entry.properties.dtype
            stored = places.get(key, {})
            self._chunks[key] = [
                _Chunk(tuple(chunk.offsets), tuple(chunk.sizes), info.relative_path, info.offset, info.length)
                for chunk in entry.chunks
                if (info := stored.get(tuple(chunk.offsets))) is not None
            ]
        for name in {chunk.file for chunks in self._chunks.values() for chunk in chunks}:
            if Path(name).name != name:
                raise CheckpointError(f"{directory}: .metadata names {name!r}, which lies outside the checkpoint")

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
        lengths = [part.stop - part.start for part in region]
        out: torch.Tensor | None = None
        covered = 0
        for chunk in self._chunks[key]:
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
            try:
                tensor = torch.load(Window(file, chunk.start, chunk.length), map_location="cpu", weights_only=True)
            except Exception as error:  # on damaged bytes torch's unpickler fails in any way, IndexError among them
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise CheckpointError(f"{where}: the stored chunk is damaged ({reason}); restore the file") from error
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != chunk.sizes:
            actual = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise CheckpointError(f"{where}: the chunk holds {actual}, .metadata says {list(chunk.sizes)}")
        return tensor


@dataclasses.dataclass(frozen=True)
class TorchDistWeights:
    """A model's tensors in a distributed checkpoint under canonical names. Implements ``Weights``.

    Attributes:
        store: the checkpoint.
        shape, family: the model's; ``shape.vocab_size`` is the true vocabulary, stored rows beyond it are padding.
        prefix: before every key.
    """

    store: TorchDist
    shape: ModelShape
    family: str
    prefix: str

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
    weights = TorchDistWeights(store, shape, architecture.family, prefix)
    weights.check()
    architecture = dataclasses.replace(architecture, dtype=weights.dtype())
    if tokenizer is not None:
        check_tokenizer(tokenizer, shape.vocab_size)
    return Checkpoint(shape, architecture, weights, tokenizer, path, form, lineage)
