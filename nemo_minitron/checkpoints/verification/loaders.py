"""Logits of a checkpoint, in a process of its own.

``python -m nemo_minitron.checkpoints.verification.loaders LOADER PATH TOKENS OUT DTYPE``, where LOADER is

- the name of a format: its own library's, the ``loader`` of its entry in :mod:`nemo_minitron.checkpoints.formats`;
- ``megatron``: a plain Megatron-core model filled by :func:`nemo_minitron.checkpoints.live.load_into`, which reads any
  format without running anything that the file names (NeMo's loaders unpickle and instantiate, so they are used only
  on checkpoints that this suite wrote).

A process of its own, because each of these sets up process groups and global state that a running stage must keep.
TOKENS holds ``ids`` ``[rows, s]``; OUT gets ``logits`` ``[rows, s, vocabulary rows]`` in float32. Weights are
rounded to DTYPE and computed with in float32.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

from nemo_minitron.checkpoints.formats import FORMATS
from nemo_minitron.checkpoints.io import open_checkpoint
from nemo_minitron.jobs.launch import end_with_launcher

__all__ = ["main"]


def _megatron(path: Path, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from nemo_minitron.runtime import cpu

    cpu.activate()  # a check needs no device, and this way of loading is the tested one
    from nemo_minitron.checkpoints.live import load_into
    from nemo_minitron.checkpoints.verification.forward import model_logits
    from nemo_minitron.checkpoints.weights import CastWeights
    from nemo_minitron.runtime.groups import ParallelLayout, initialize
    from nemo_minitron.runtime.model import build_model

    checkpoint = open_checkpoint(path)
    weights = CastWeights(checkpoint.weights, str(dtype).removeprefix("torch."))
    checkpoint = dataclasses.replace(checkpoint, weights=weights)
    groups = initialize(ParallelLayout())
    chunks = build_model(checkpoint.shape, checkpoint.architecture, groups)
    load_into(chunks, checkpoint, groups)
    return model_logits(chunks[0].eval(), ids)


def main(kind: str, path: str, tokens: str, out: str, dtype: str) -> None:
    """Compute the logits and save them to ``out`` (safetensors), beside ``tokens``; ends when its launcher does."""
    from safetensors.torch import load_file, save_file

    end_with_launcher(clear=Path(tokens).parent)
    loader = _megatron if kind == "megatron" else FORMATS[kind].loader
    assert loader is not None, f"the format {kind} has no loader"
    with torch.no_grad():
        logits = loader(Path(path), load_file(tokens)["ids"], getattr(torch, dtype))
    save_file({"logits": logits.float().contiguous()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
