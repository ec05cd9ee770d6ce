"""Importance matrices: how large the inputs of each matrix are, by column, for llama.cpp's quantizer.

The file has the form of llama.cpp's ``llama-imatrix`` (``tools/imatrix/imatrix.cpp``): for each matrix the sums of the
squares of its inputs, ``NAME.in_sum2`` ``[E, columns]``, and how many inputs there were, ``NAME.counts`` ``[E, 1]``,
with E the experts of a layer, or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.formats.gguf.architectures import written_as
from nemo_minitron.checkpoints.formats.gguf.places import Place, names_there
from nemo_minitron.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = ["measure_importance", "read_importance", "write_importance"]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_OUTPUT, _EMBEDDINGS = "lm_head.weight", "token_embd.weight"


def measure_importance(
    source: Checkpoint, model: torch.nn.Module, calibrate: Callable[[Any], None]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Sums of squares and counts of the inputs of every matrix, by its name in the file.

    Args:
        source: what the model was made of.
        model: transformers' model of it.
        calibrate: runs the model over text.

    Returns:
        Name -> ``[E, columns]`` and ``[E, 1]``, in float32. An expert that no token went to has zeros.
    """
    import torch

    name = written_as(source.architecture.family, source.shape)
    assert name is not None
    places = names_there(name, source.shape, source.architecture.family)
    if source.shape.tied_embeddings:
        places[_OUTPUT] = Place(_EMBEDDINGS)
    experts = source.shape.num_moe_experts or 1
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(place: Place, columns: int) -> Callable[..., None]:
        count = 1 if place.expert is None else experts
        sums, counts = found.setdefault(place.name, (torch.zeros(count, columns), torch.zeros(count, 1)))
        row = place.expert or 0

        def hook(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            given = inputs[0].detach().reshape(-1, columns).float()
            sums[row] += given.square().sum(0).cpu()
            counts[row] += len(given)

        return hook

    with ExitStack() as stack:
        for title, module in model.named_modules():
            place = places.get(f"{title}.weight")
            if place is not None and isinstance(module, torch.nn.Linear):
                handle = module.register_forward_pre_hook(watch(place, module.in_features))
                stack.callback(handle.remove)
        with torch.no_grad():
            calibrate(model)
    return found


def write_importance(path: Path, measured: Mapping[str, tuple[torch.Tensor, torch.Tensor]], *, chunk: int) -> None:
    """Write an importance matrix.

    Args:
        path: of the file.
        measured: of :func:`measure_importance`.
        chunk: tokens of a block of the text.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "")
    writer.kv_data[0].clear()  # such a file has no architecture
    writer.add_type("imatrix")
    total = max((int(counts.max()) for _, counts in measured.values()), default=0)
    writer.add_array("imatrix.datasets", ["calibration"])
    writer.add_uint32("imatrix.chunk_count", -(-total // chunk))
    writer.add_uint32("imatrix.chunk_size", chunk)
    for name, (sums, counts) in sorted(measured.items()):
        writer.add_tensor(f"{name}{_SUMS}", sums.numpy())
        writer.add_tensor(f"{name}{_COUNTS}", counts.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_importance(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The mean square of each column's inputs, ``[E * columns]`` float32, by the matrix's name in the file.

    Raises:
        CheckpointError: for a file that is no importance matrix.
    """
    import numpy as np
    from gguf import GGUFReader

    try:
        tensors = {tensor.name: np.array(tensor.data, dtype=np.float32) for tensor in GGUFReader(path).tensors}
    except Exception as error:  # on other bytes the package fails in any way
        raise CheckpointError(f"{path} is no importance matrix in llama.cpp's GGUF form ({error})") from error
    names = [name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)]
    if not names or any(f"{name}{_COUNTS}" not in tensors for name in names):
        raise CheckpointError(
            f"{path} is no importance matrix: it has no {_SUMS[1:]} and {_COUNTS[1:]} of matrices; make one with "
            "llama-imatrix, or give text in `data`"
        )
    means = {}
    for name in names:
        counts = tensors[f"{name}{_COUNTS}"].reshape(-1, 1)
        sums = tensors[f"{name}{_SUMS}"].reshape(len(counts), -1)
        # an expert that no token went to has no say
        mean = np.where(counts > 0, sums / np.maximum(counts, 1), 1.0)
        means[name] = np.ascontiguousarray(mean, dtype=np.float32).ravel()
    return means
