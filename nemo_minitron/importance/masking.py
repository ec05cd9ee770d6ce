"""Leave decoder layers of a live Megatron model out of its forward pass. No weight is copied, moved or changed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from nemo_minitron.errors import ShapeError

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

__all__ = ["Prefix", "left_out"]


class _PassThrough(torch.nn.Module):
    """Replaces a layer and returns its input, in the form in which ``TransformerLayer.forward`` returns hidden states.

    It holds the layer, so that a pipeline stage without any other layer still has parameters, and with them a device.
    """

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.layer_number = layer.layer_number

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> tuple[torch.Tensor, Any]:
        return hidden_states, options.get("context")


@dataclass
class Prefix:
    """The hidden states that enter a layer, for each micro-batch in order. The layers before it need not run again.

    Attributes:
        layer: the layer that they enter (0-based, of the whole model).
        without: layers before it that were left out.
        states: ``[s, b, H]`` on the CPU (``[s/tp, b, H]`` under sequence parallelism) of each micro-batch, on the ranks
            that hold the layer; empty on the others. A pass that starts from them uses them up.
    """

    layer: int
    without: frozenset[int]
    states: deque[torch.Tensor] = field(default_factory=deque)

    def serves(self, layers: Iterable[int]) -> bool:
        """Whether a pass without ``layers`` is the same up to :attr:`layer`."""
        return {layer for layer in layers if layer < self.layer} == self.without


@contextmanager
def left_out(
    chunks: Sequence[GPTModel], layers: Iterable[int], *, start: Prefix | None = None, keep: int | None = None
) -> Iterator[Prefix | None]:
    """Within the block the model runs without some of its layers. Every rank enters it.

    A layer that is left out passes its hidden states on untouched, under any tensor, pipeline, virtual-pipeline and
    sequence parallelism: the forward pass is that of the model with the layer deleted. The modules are back in their
    places afterwards, also after an error. For forward passes without gradients.

    Args:
        chunks: this rank's part of the model.
        layers: 0-based, of the whole model.
        start: start from these states: layers before ``start.layer`` return their input, and the states enter there.
            Every pass must then run the micro-batches of ``start``, in the same order.
        keep: collect the hidden states that enter this layer.

    Yields:
        The states of ``keep``, which the passes within the block fill; None without it.

    Raises:
        ShapeError: for a layer that the model does not have, if no layer is left, or if ``start`` left out other
            layers.
    """
    dropped, count = frozenset(layers), chunks[0].config.num_layers
    if outside := sorted(layer for layer in dropped if not 0 <= layer < count):
        raise ShapeError(f"layer {outside[0]} cannot be left out: the model has layers 0..{count - 1}")
    if len(dropped) == count:
        raise ShapeError(f"all {count} layers are to be left out; leave at least one")
    if start is not None and (not start.serves(dropped) or (keep is not None and keep < start.layer)):
        raise ShapeError(
            f"hidden states that enter layer {start.layer} without layers {sorted(start.without)} do not serve a pass "
            f"without layers {sorted(dropped)}" + (f" that keeps those of layer {keep}" if keep is not None else "")
        )
    kept = None if keep is None else Prefix(keep, frozenset(layer for layer in dropped if layer < keep))
    idle = dropped if start is None else dropped | frozenset(range(start.layer))
    with ExitStack() as stack:
        for chunk in chunks:
            modules = chunk.decoder.layers
            for index, module in enumerate(modules):
                if module.layer_number - 1 in idle:
                    modules[index] = _PassThrough(module)
                    stack.callback(modules.__setitem__, index, module)
                layer = module.layer_number - 1
                # The order matters where both are of one layer: what is kept is what was put in.
                if start is not None and layer == start.layer:
                    stack.enter_context(_hooked(modules[index], _Feed(start)))
                if kept is not None and layer == kept.layer:
                    stack.enter_context(_hooked(modules[index], _Collect(kept)))
        yield kept


@contextmanager
def _hooked(module: torch.nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class _Feed:
    """Replaces a layer's input by the kept states, micro-batch by micro-batch."""

    def __init__(self, prefix: Prefix) -> None:
        self._states = prefix.states

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        device = kwargs["hidden_states"].device
        return args, {**kwargs, "hidden_states": self._states.popleft().to(device)}


class _Collect:
    """Keeps a layer's input, of each micro-batch."""

    def __init__(self, prefix: Prefix) -> None:
        self._states = prefix.states

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._states.append(kwargs["hidden_states"].detach().to("cpu", copy=True))
