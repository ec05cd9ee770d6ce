"""Where a model's tensors are in a GGUF file, by the ``gguf`` package's own table of names."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_minitron import axes
from nemo_minitron.axes import name_parts
from nemo_minitron.checkpoints.formats.gguf.architectures import EXPERTS
from nemo_minitron.checkpoints.formats.huggingface import names as naming
from nemo_minitron.errors import CheckpointError
from nemo_minitron.shape import ModelShape

__all__ = ["Place", "names_there"]


@dataclass(frozen=True)
class Place:
    """Where a tensor of transformers is in a file.

    Attributes:
        name: of the tensor in the file.
        expert: its number in that tensor's first dimension; None where it is all of it.
    """

    name: str
    expert: int | None = None


def names_there(name: str, shape: ModelShape, family: str) -> dict[str, Place]:
    """Name in transformers -> where it is in a file of this architecture, in the order of the forward pass.

    Raises:
        CheckpointError: if the package is too old for it.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    numbers = [number for number, title in MODEL_ARCH_NAMES.items() if title == name]
    if not numbers:
        raise CheckpointError(f"the gguf package does not know {name} files; install a newer one")
    table = get_tensor_name_map(numbers[0], shape.num_layers)
    there: dict[str, Place] = {}
    for entry in axes.parameters(axes.family(family), shape):
        parts = naming.hf_names(family, entry.name)
        layer, expert, below = name_parts(entry.name)
        if expert is not None:
            there |= {
                part: Place(f"blk.{layer}.{title}", expert) for part, title in zip(parts, EXPERTS[below], strict=True)
            }
            continue
        for part in parts:
            title = table.get_name(part, try_suffixes=(".weight", ".bias"))
            if title is None:
                raise CheckpointError(f"the gguf package has no name for {part} in {name} files; install a newer one")
            there[part] = Place(title)
    return there
