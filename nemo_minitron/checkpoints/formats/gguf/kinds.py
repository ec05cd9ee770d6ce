"""How the numbers of a GGUF file are stored: the kinds that can be written, and which tensor gets which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["KINDS", "Kind", "stored_as", "wider"]


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: as llama.cpp spells it, in settings and names of files.
        note: what it is, in a few words.
        file_type: ``general.file_type`` (``llama_ftype``).
        block: numbers in a block, which the size of a row must be a multiple of; 1 where there are no blocks.
        output: kind of the output layer, or of the embeddings that are it; None for the file's own.
        by_llama_cpp: llama.cpp's own quantizer writes it, from a file of another kind.
    """

    name: str
    note: str
    file_type: int
    block: int = 1
    output: str | None = None
    by_llama_cpp: bool = False


def _by_llama_cpp(name: str, bits: str, file_type: int) -> Kind:
    return Kind(name, f"about {bits} bits a weight, by llama.cpp's quantizer", file_type, block=256, by_llama_cpp=True)


#: By name. In Q4_0 the output layer has 8 bits: with 4 it costs most of what the file saves.
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("F32", "float32, exact", 0),
        Kind("F16", "float16", 1),
        Kind("BF16", "bfloat16", 32),
        Kind("Q8_0", "8.5 bits a weight", 7, block=32),
        Kind("Q4_0", "4.5 bits a weight", 2, block=32, output="Q8_0"),
        _by_llama_cpp("Q2_K", "3", 10),
        _by_llama_cpp("Q3_K_M", "3.9", 12),
        _by_llama_cpp("Q4_K_S", "4.6", 14),
        _by_llama_cpp("Q4_K_M", "4.8", 15),
        _by_llama_cpp("Q5_K_S", "5.5", 16),
        _by_llama_cpp("Q5_K_M", "5.7", 17),
        _by_llama_cpp("Q6_K", "6.6", 18),
    )
}


def stored_as(kind: Kind, name: str, shape: tuple[int, ...], *, output: str) -> str:
    """The kind of numbers of one tensor, as llama.cpp's converter chooses it.

    Vectors and routers are float32, and what no block can hold is float16.

    Args:
        kind: of the file; none that llama.cpp's quantizer writes.
        name, shape: of the tensor, rows first.
        output: name of the tensor that is the output layer.
    """
    if len(shape) < 2 or name.endswith("ffn_gate_inp.weight"):
        return "F32"
    chosen = KINDS[kind.output] if kind.output is not None and name == output else kind
    return "F16" if shape[-1] % chosen.block else chosen.name


def wider(kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The tensors that stay in float16 in a file of a kind, since its blocks cannot hold their rows."""
    return [name for name, shape in shapes.items() if len(shape) > 1 and shape[-1] % kind.block]
