"""The parts of a model that a streamed pass runs one after the other, each loaded when it is asked for."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from nemo_minitron.checkpoints import Checkpoint, load_into
from nemo_minitron.config import ParallelLayout
from nemo_minitron.errors import ShapeError
from nemo_minitron.runtime.groups import Groups
from nemo_minitron.runtime.model import build_chunk, layer_specification, place, transformer_config
from nemo_minitron.shape import uniform_faults

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from nemo_minitron.shape import ModelShape

__all__ = ["StreamedModel", "streamed_faults"]


def streamed_faults(shape: ModelShape | None, layout: ParallelLayout) -> list[str]:
    """Why a model cannot run layer by layer in a layout; empty if it can.

    Args:
        shape: of the model; None where it is not known yet.
        layout: of the stage's processes.
    """
    faults = [] if shape is None else uniform_faults(shape, "memory=streamed")
    faults += [
        f"parallel.{name}={getattr(layout, name)}: with memory=streamed a layer at a time is in memory, and ranks "
        "share the samples alone (parallel.data); set it to 1, or memory=live"
        for name in ("tensor", "pipeline", "context", "expert")
        if getattr(layout, name) > 1
    ]
    return faults


class StreamedModel:
    """A checkpoint whose embedding, layers and output run one at a time, as chunks of Megatron's ``GPTModel``.

    Every method reads the weights of its part anew. The caller drops a part before it asks for the next, so that one
    part is in memory, and while it is filled one tensor of the checkpoint.

    Args:
        checkpoint: of the model.
        groups: of this process; the layout has data parallelism alone.
        dtype: of weights and hidden states.

    Raises:
        ShapeError: for layers of different sizes, or another layout.
    """

    def __init__(self, checkpoint: Checkpoint, groups: Groups, *, dtype: torch.dtype = torch.float32) -> None:
        if faults := streamed_faults(checkpoint.shape, groups.layout):
            raise ShapeError(faults)
        self.checkpoint, self.groups, self.dtype = checkpoint, groups, dtype
        self.shape, self.architecture = checkpoint.shape, checkpoint.architecture
        self._config = transformer_config(self.shape, self.architecture, groups.layout, groups.device, dtype=dtype)

    def embedding(self) -> GPTModel:
        """The chunk that turns tokens into the hidden states before the first layer."""
        chunk = self._chunk(first=True)
        del chunk.decoder.layers[0]
        return self._loaded(chunk)

    def layer(self, index: int) -> GPTModel:
        """The chunk of one layer, with its number in the whole model.

        Args:
            index: 0-based.
        """
        from megatron.core.transformer.spec_utils import build_module

        if not 0 <= index < self.shape.num_layers:
            raise ShapeError(f"layer {index}: the model has layers 0..{self.shape.num_layers - 1}")
        chunk = self._between
        chunk.decoder.layers = torch.nn.ModuleList()  # the last layer's memory is free before it is asked for again
        # A new module, not the last one with another number: a layer may be built by its number (layer types).
        layer = build_module(self._specification, config=self._config, layer_number=index + 1)
        place(layer, self.groups.device.torch, self.dtype)
        chunk.decoder.layers.append(layer)
        return self._loaded(chunk)

    def output(self) -> GPTModel:
        """The chunk that turns the hidden states after the last layer into logits."""
        chunk = self._chunk(last=True)
        del chunk.decoder.layers[0]
        return self._loaded(chunk)

    def final_norm(self) -> torch.nn.Module:
        """The norm after the last layer; the output layer is not read."""
        chunk = self._chunk(last=True)
        load_into([chunk], self.checkpoint, self.groups, skip=(self.checkpoint.family.output, "decoder.layers."))
        norm: torch.nn.Module = chunk.decoder.final_layernorm
        return norm

    def release(self) -> None:
        """Drop the layer that :meth:`layer` gave last."""
        self.__dict__.pop("_between", None)

    @cached_property
    def _between(self) -> GPTModel:
        """A chunk for one layer at a time; it holds the rotary embeddings."""
        chunk = self._chunk()
        del chunk.decoder.layers[0]
        return chunk

    @cached_property
    def _specification(self) -> Any:
        return layer_specification(self._config, self.architecture, self.groups)

    def _chunk(self, *, first: bool = False, last: bool = False) -> GPTModel:
        """A chunk with one layer, which is not filled."""
        config = copy.copy(self._config)
        config.num_layers = 1
        chunk = build_chunk(config, self.shape, self.architecture, self.groups, first=first, last=last)
        config.num_layers = self.shape.num_layers
        return chunk

    def _loaded(self, chunk: GPTModel) -> GPTModel:
        load_into([chunk], self.checkpoint, self.groups)
        return chunk.eval()
