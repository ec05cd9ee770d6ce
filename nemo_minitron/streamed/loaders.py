"""Logits of a checkpoint a layer at a time, in a process of its own; for models that are larger than the memory.

``python -m nemo_minitron.streamed.loaders LOADER PATH TOKENS OUT DTYPE``, with the arguments of
:mod:`nemo_minitron.checkpoints.verification.loaders`. LOADER is

- the name of a format with a ``streamed_loader``: its own library's layers;
- the name of a format whose weights are ``distributed``: Megatron's layers, each filled by
  ``megatron.core.dist_checkpointing.load``, as NeMo loads it, with torch's reader below it (which unpickles the
  metadata, so that it reads only what this suite wrote);
- any other, or ``megatron``: Megatron's layers, each filled by :func:`nemo_minitron.checkpoints.load_into`.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nemo_minitron.checkpoints.formats import FORMATS
from nemo_minitron.checkpoints.io import open_checkpoint
from nemo_minitron.jobs.launch import end_with_launcher

if TYPE_CHECKING:
    from nemo_minitron.streamed.model import StreamedModel

__all__ = ["main"]


def _logits(model: StreamedModel, ids: torch.Tensor) -> torch.Tensor:
    """``[rows, s, vocabulary rows]`` of all samples together, layer by layer."""
    from nemo_minitron.data.blocks import Blocks
    from nemo_minitron.streamed.passes import Pass

    # A block is inputs and one label more.
    run = Pass(model, Blocks.of(torch.nn.functional.pad(ids, (0, 1))), len(ids))
    run.embed()
    for layer in range(model.shape.num_layers):
        run.through(model.layer(layer))
    model.release()
    chunk = model.output()
    return torch.cat([run.run(chunk, start, inputs, at, mask).float() for start, inputs, at, mask in run.batches()])


def _by_megatron(path: Path, ids: torch.Tensor, dtype: torch.dtype, distributed: tuple[Path, str] | None) -> Any:
    from nemo_minitron.runtime import cpu

    cpu.activate()  # a check needs no device, and this way of loading is the tested one
    from megatron.core import dist_checkpointing

    from nemo_minitron.checkpoints.weights import CastWeights
    from nemo_minitron.runtime.groups import ParallelLayout, initialize
    from nemo_minitron.streamed.model import StreamedModel
    from nemo_minitron.streamed.slices import ReadSlices

    checkpoint = open_checkpoint(path)
    weights = CastWeights(checkpoint.weights, str(dtype).removeprefix("torch."))
    checkpoint = dataclasses.replace(checkpoint, weights=weights)

    class ByMegatron(StreamedModel):
        """A model whose parts Megatron's own reader fills."""

        def _loaded(self, chunk: Any) -> Any:
            assert distributed is not None
            directory, prefix = distributed
            wanted = chunk.sharded_state_dict(prefix=prefix)
            # A part of the model covers a part of the file.
            loaded: Any = dist_checkpointing.load(
                wanted, str(directory), sharded_strategy=ReadSlices(), validate_access_integrity=False
            )
            local = {f"decoder.layers.{layer.layer_number - 1}.": n for n, layer in enumerate(chunk.decoder.layers)}
            values: dict[str, Any] = {}
            for key in wanted:  # the file has more, such as the step
                name, value = key.removeprefix(prefix), loaded[key]
                begin = next((begin for begin in local if name.startswith(begin)), None)
                name = name if begin is None else f"decoder.layers.{local[begin]}.{name.removeprefix(begin)}"
                values[name] = value
            chunk.load_state_dict(values)
            return chunk.eval()

    kind = StreamedModel if distributed is None else ByMegatron
    return _logits(kind(checkpoint, initialize(ParallelLayout())), ids)


def main(kind: str, path: str, tokens: str, out: str, dtype: str) -> None:
    """Compute the logits and save them to ``out`` (safetensors), beside ``tokens``; ends when its launcher does."""
    from safetensors.torch import load_file, save_file

    end_with_launcher(clear=Path(tokens).parent)
    ids, rounded = load_file(tokens)["ids"], getattr(torch, dtype)
    entry = None if kind == "megatron" else FORMATS[kind]
    with torch.no_grad():
        if entry is not None and entry.streamed_loader is not None:
            logits = entry.streamed_loader(Path(path), ids, rounded)
        elif entry is not None and entry.distributed is not None:
            with tempfile.TemporaryDirectory(dir=Path(path).parent, prefix=".verify.") as scratch:
                distributed = entry.distributed(Path(path), Path(scratch))
                logits = _by_megatron(Path(path), ids, rounded, distributed)
        else:
            logits = _by_megatron(Path(path), ids, rounded, None)
    save_file({"logits": logits.float().contiguous()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
