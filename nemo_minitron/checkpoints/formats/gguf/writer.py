"""Any checkpoint -> GGUF files of several kinds at once, tensor by tensor, through the ``gguf`` package's own writer.

Names, order of rows and kinds of numbers are those of llama.cpp's ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron import axes
from nemo_minitron.accounting import warn_once
from nemo_minitron.checkpoints.base import Checkpoint, Weights
from nemo_minitron.checkpoints.formats.entry import ExportNotes, Progress
from nemo_minitron.checkpoints.formats.gguf.architectures import GGUFArchitecture, architecture_of, written_as
from nemo_minitron.checkpoints.formats.gguf.faults import gguf_faults
from nemo_minitron.checkpoints.formats.gguf.kinds import KINDS, Kind, stored_as, wider
from nemo_minitron.checkpoints.formats.gguf.model_fields import add_model, add_notes
from nemo_minitron.checkpoints.formats.gguf.places import Place, names_there
from nemo_minitron.checkpoints.formats.gguf.rope import DIVISORS, llama3_divisors
from nemo_minitron.checkpoints.formats.gguf.vocabulary import GGUFVocabulary, vocabulary_of
from nemo_minitron.checkpoints.formats.huggingface import names as naming
from nemo_minitron.errors import CheckpointError, ShapeError
from nemo_minitron.runtime.requirements import require

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGUFWriter

__all__ = ["check_gguf", "write_gguf"]

_EMBEDDINGS, _OUTPUT = "token_embd.weight", "output.weight"
#: Architectures whose output layer llama.cpp wants in the file where it is the embeddings too.
_UNTIED = ("nemotron",)


@dataclass(frozen=True)
class _Source:
    """Where the rows of a tensor of the file come from.

    Attributes:
        canonical: the canonical tensor.
        part: which of the tensors of transformers that it is made of.
    """

    canonical: axes.Entry
    part: int


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file.

    Attributes:
        name, shape: its name, and its sizes, rows first.
        sources: one, or one for each expert.
        values: of a tensor that follows from the constants; without sources.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[_Source, ...] = ()
    values: torch.Tensor | None = None


def check_gguf(checkpoint: Checkpoint) -> GGUFVocabulary:
    """What of a model would be refused, before anything is written.

    Returns:
        The keys of its tokenizer.

    Raises:
        ShapeError: for a family or feature that llama.cpp does not have.
        CheckpointError: for a tokenizer that is missing, or that GGUF cannot express.
    """
    if faults := gguf_faults(checkpoint.shape, checkpoint.architecture):
        raise ShapeError(faults)
    if checkpoint.tokenizer is None:
        raise CheckpointError(
            f"{checkpoint.path} carries no tokenizer, and a GGUF file holds its model's; put the tokenizer's files "
            "beside the weights"
        )
    return vocabulary_of(checkpoint.tokenizer, checkpoint.shape.vocab_size, checkpoint.architecture)


def write_gguf(
    checkpoint: Checkpoint,
    files: Mapping[str, Path],
    *,
    notes: ExportNotes | None = None,
    requantized: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, dict[str, int]]:
    """Write a model as GGUF files (callers write aside).

    Every tensor is read once for all files. Memory holds one tensor of the file and the one that it is made of; of a
    mixture of experts, one of the three matrices of a layer's experts.

    Args:
        checkpoint: any opened checkpoint; its weights may be wrapped.
        files: name of a kind of :data:`~nemo_minitron.checkpoints.formats.gguf.kinds.KINDS` that llama.cpp's quantizer
            is not needed for -> the file to write.
        notes: name, base and license.
        requantized: kinds that llama.cpp's quantizer will make of one of the files, for the warning.
        progress: called after each tensor.

    Returns:
        For each file how many of its matrices are stored in which kind of numbers: ``{"Q8_0": {"Q8_0": 211}}``.

    Raises:
        ShapeError, CheckpointError: as :func:`check_gguf`; for numbers that are too large for float16.
        MissingDependency: without the ``gguf`` package.
    """
    require("gguf", for_="writing GGUF")
    vocabulary = check_gguf(checkpoint)
    shape, architecture = checkpoint.shape, checkpoint.architecture
    name = written_as(architecture.family, shape)
    assert name is not None
    biases = axes.family(architecture.family).qkv_bias
    entry = architecture_of(name, experts=shape.num_moe_experts is not None, biases=biases)
    assert entry is not None
    tensors = list(_tensors(checkpoint, name))
    output = _OUTPUT if any(tensor.name == _OUTPUT for tensor in tensors) else _EMBEDDINGS
    notes = notes or ExportNotes(checkpoint.path.name)
    opened = {kind: _open(KINDS[kind], path, name, checkpoint, vocabulary, notes) for kind, path in files.items()}
    stored: dict[str, dict[str, str]] = {
        kind: {tensor.name: stored_as(KINDS[kind], tensor.name, tensor.shape, output=output) for tensor in tensors}
        for kind in files
    }
    _say_wider(checkpoint, [*files, *requantized], tensors)
    try:
        for kind, writer in opened.items():
            for tensor in tensors:
                _add_info(writer, tensor, stored[kind][tensor.name])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        for done, (tensor, data) in enumerate(_data(checkpoint.weights, checkpoint, entry, tensors, stored), 1):
            for kind, writer in opened.items():
                writer.write_tensor_data(data[stored[kind][tensor.name]])
            if progress is not None:
                progress(tensor.name, done, len(tensors))
    finally:
        for writer in opened.values():
            writer.close()
    matrices = [tensor.name for tensor in tensors if len(tensor.shape) > 1]
    return {kind: _counted([stored[kind][title] for title in matrices]) for kind in files}


def _open(
    kind: Kind, path: Path, name: str, checkpoint: Checkpoint, vocabulary: GGUFVocabulary, notes: ExportNotes
) -> GGUFWriter:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, name)
    add_notes(writer, notes, checkpoint.shape, checkpoint.architecture)
    add_model(writer, checkpoint.shape, checkpoint.architecture, kind)
    vocabulary.add(writer)
    return writer


def _tensors(checkpoint: Checkpoint, name: str) -> Iterator[_Tensor]:
    """The tensors of the file, in the order of the forward pass."""
    shape, architecture = checkpoint.shape, checkpoint.architecture
    there = names_there(name, shape, architecture.family)
    sources: dict[str, list[_Source]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    embeddings: tuple[tuple[int, ...], _Source] | None = None
    for entry in axes.parameters(checkpoint.family, shape):
        for part, (title, size) in enumerate(naming.hf_parts(architecture.family, entry).items()):
            place: Place = there[title]
            sources.setdefault(place.name, []).append(_Source(entry, part))
            shapes[place.name] = size if place.expert is None else (shape.num_moe_experts or 0, *size)
            if place.name == _EMBEDDINGS:
                embeddings = size, _Source(entry, part)
    if architecture.rotary_type == "llama3":
        divisors = _divisors(checkpoint)
        yield _Tensor(DIVISORS, tuple(divisors.shape), values=divisors)
    for title, of in sources.items():
        yield _Tensor(title, shapes[title], tuple(of))
    if _OUTPUT not in sources and name in _UNTIED and embeddings is not None:
        yield _Tensor(_OUTPUT, embeddings[0], (embeddings[1],))


def _divisors(checkpoint: Checkpoint) -> torch.Tensor:
    scaling: dict[str, Any] = checkpoint.architecture.rotary_scaling or {}
    return llama3_divisors(
        checkpoint.architecture.rotary_base,
        checkpoint.shape.head_dim,
        factor=scaling["factor"],
        low=scaling["low_freq_factor"],
        high=scaling["high_freq_factor"],
        original=scaling["original_max_position_embeddings"],
    )


def _add_info(writer: GGUFWriter, tensor: _Tensor, stored: str) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    kind = GGMLQuantizationType[stored]
    rows = quant_shape_to_byte_shape(tensor.shape, kind)
    size = int(np.prod(rows, dtype=np.int64))
    # a type of numbers that is not bytes: the shape is then the tensor's own
    writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)


def _data(
    weights: Weights,
    checkpoint: Checkpoint,
    entry: GGUFArchitecture,
    tensors: Sequence[_Tensor],
    stored: Mapping[str, Mapping[str, str]],
) -> Iterator[tuple[_Tensor, dict[str, np.ndarray[Any, Any]]]]:
    """Each tensor in all kinds of numbers that some file has it in."""
    import numpy as np

    read = _reader(weights)
    for tensor in tensors:
        wanted = dict.fromkeys(of[tensor.name] for of in stored.values())
        change = entry.changes.get(".".join(tensor.name.split(".")[-2:]))
        parts: dict[str, list[np.ndarray[Any, Any]]] = {kind: [] for kind in wanted}
        for numbers in [tensor.values] if tensor.values is not None else map(read, tensor.sources):
            assert numbers is not None
            numbers = numbers.float()
            if change is not None:
                numbers = change.make(numbers, checkpoint.shape)
            for kind, held in parts.items():
                held.append(_quantized(numbers, kind, tensor.name, checkpoint))
        stacked = len(tensor.sources) > 1
        yield tensor, {kind: np.stack(held) if stacked else held[0] for kind, held in parts.items()}


def _reader(weights: Weights) -> Callable[[_Source], torch.Tensor]:
    """Reads parts of canonical tensors; the last tensor stays, whose other parts come next."""
    last: dict[str, list[torch.Tensor]] = {}

    def read(source: _Source) -> torch.Tensor:
        name = source.canonical.name
        if name not in last:
            last.clear()
            last[name] = naming.split(source.canonical.row.axes, weights.tensor(name), source.canonical.sizes)
        return last[name][source.part]

    return read


def _quantized(numbers: torch.Tensor, kind: str, name: str, checkpoint: Checkpoint) -> np.ndarray[Any, Any]:
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    values = np.ascontiguousarray(numbers.numpy())
    if kind == "F16":
        with np.errstate(over="ignore"):
            narrow = values.astype(np.float16)
        if not np.array_equal(np.isfinite(narrow), np.isfinite(values)):
            raise CheckpointError(
                f"{checkpoint.path}: {name} has numbers up to {np.abs(values).max():.3g}, beyond float16's 65504; "
                "write gguf.types BF16 or F32 in place of F16, and Q8_0 only where its blocks fit"
            )
        return narrow
    return quantize(values, GGMLQuantizationType[kind])


def _say_wider(checkpoint: Checkpoint, kinds: Sequence[str], tensors: Sequence[_Tensor]) -> None:
    """Name, once for each size of blocks, the tensors that blocks cannot hold."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    for block, names in _by_block(kinds).items():
        if left := wider(KINDS[names[0]], shapes):
            sizes = ", ".join(map(str, sorted({shapes[name][-1] for name in left})))
            stay = "get llama.cpp's blocks of 32, or float16" if block > 32 else "stay in float16"
            warn_once(
                checkpoint.path,
                f"GGUF {', '.join(names)}: {len(left)} tensors whose rows of {sizes} are no multiple of {block} "
                f"{stay}: {', '.join(dict.fromkeys(_general(name) for name in left))}",
            )


def _by_block(kinds: Sequence[str]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for kind in kinds:
        if KINDS[kind].block > 1:
            found.setdefault(KINDS[kind].block, []).append(kind)
    return found


def _general(name: str) -> str:
    """The name of a tensor for all layers: ``blk.3.ffn_down.weight`` -> ``blk.*.ffn_down.weight``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _counted(names: Sequence[str]) -> dict[str, int]:
    return {name: names.count(name) for name in dict.fromkeys(names)}
