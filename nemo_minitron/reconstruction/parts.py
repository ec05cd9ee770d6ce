"""One layer of a live model, cut at the matrices that are refitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch

from nemo_minitron.checkpoints.live import canonical_parameters
from nemo_minitron.importance.hooks import fused_norm
from nemo_minitron.streamed import Pass

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

__all__ = ["Batch", "Layer", "watched"]

#: First sample, ``[b, s]`` inputs, positions and mask, as :meth:`nemo_minitron.streamed.Pass.batches` gives them.
Batch = tuple[int, torch.Tensor, torch.Tensor, "torch.Tensor | None"]


class _Enough(Exception):
    """What was to be seen has been seen; the forward pass need not go on."""


class Layer:
    """A layer of a model that is streamed, whose parts run one by one.

    Works with Megatron's own layers and with Transformer Engine's, where a norm is fused into the linear after it.

    Args:
        run: the pass whose states enter the layer.
        chunk: with the one layer, from :meth:`nemo_minitron.streamed.StreamedModel.layer`.

    Attributes:
        module: Megatron's ``TransformerLayer``.
        parameters: by canonical name below ``decoder.layers.N.``.
    """

    def __init__(self, run: Pass, chunk: GPTModel) -> None:
        self.run, self.chunk = run, chunk
        self.module: Any = chunk.decoder.layers[0]
        prefix = f"decoder.layers.{self.module.layer_number - 1}."
        self.parameters = {
            name.removeprefix(prefix): parameter
            for name, parameter in canonical_parameters(chunk)
            if name.startswith(prefix)
        }

    @property
    def mixture(self) -> bool:
        """The MLP is a mixture of experts."""
        return hasattr(self.module.mlp, "router")

    def attention_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[s, b, H]`` hidden states -> what queries, keys and values are made of."""
        return _norm(self.module.input_layernorm, self.module.self_attention.linear_qkv, hidden)

    def mlp_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[s, b, H]`` hidden states after attention -> what the MLP reads."""
        return _norm(self.module.pre_mlp_layernorm, None if self.mixture else self.module.mlp.linear_fc1, hidden)

    def heads(self, batch: Batch) -> torch.Tensor:
        """``[s, b, A * head_dim]`` inputs of the attention's projection."""
        return self._until(self.module.self_attention.linear_proj, batch)

    def middle(self, batch: Batch) -> torch.Tensor:
        """``[s, b, H]`` hidden states after attention."""
        return self._until(self.module.pre_mlp_layernorm, batch)

    def neurons(self, middle: torch.Tensor) -> torch.Tensor:
        """``[s, b, F]`` inputs of the down projection of a dense MLP."""
        seen: list[torch.Tensor] = []
        with watched(self.module.mlp.linear_fc2, seen.append, stop=True), suppress(_Enough):
            self.mlp(middle)
        return seen[0]

    def routing(self, normed: torch.Tensor) -> torch.Tensor:
        """``[s, b, H]`` inputs of the router -> ``[s * b, E]`` bool, the tokens that reach each expert."""
        routed: torch.Tensor = self.module.mlp.router(normed)[1]
        return routed.bool().view(-1, routed.shape[-1])

    def shares(self, normed: torch.Tensor) -> torch.Tensor:
        """``[s, b, H]`` inputs of the router -> ``[s * b, E]``, the weights of the experts in each token's output."""
        shares: torch.Tensor = self.module.mlp.router(normed)[0]
        return shares.view(-1, shares.shape[-1])

    def expert_neurons(self, expert: int, middle: torch.Tensor) -> torch.Tensor:
        """``[tokens, F]`` inputs of an expert's down projection, of the tokens that reach it, in their order.

        Megatron has multiplied them by the router's weight.
        """
        linear = self.module.mlp.experts.local_experts[expert].linear_fc2
        seen: list[torch.Tensor] = []
        with watched(linear, seen.append, stop=True), suppress(_Enough):
            self.mlp(middle)
        return seen[0] if seen else middle.new_zeros(0, linear.weight.shape[1])

    def mlp(self, middle: torch.Tensor) -> torch.Tensor:
        """``[s, b, H]`` what the MLP adds to the hidden states after attention."""
        output, _ = self.module.mlp(self.module.pre_mlp_layernorm(middle))
        result: torch.Tensor = output
        return result

    def whole(self, batch: Batch) -> torch.Tensor:
        """``[s, b, H]`` hidden states after the layer."""
        return self.run.run(self.chunk, *batch)

    def _until(self, module: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """The input of a module in a forward pass, which ends there."""
        seen: list[torch.Tensor] = []
        with watched(module, seen.append, stop=True), suppress(_Enough):
            self.whole(batch)
        return seen[0]


@contextmanager
def watched(module: torch.nn.Module, see: Callable[[torch.Tensor], Any], *, stop: bool = False) -> Iterator[None]:
    """Within the block ``see`` gets each input of a module.

    Args:
        module: whose inputs.
        see: called with the first one of each call.
        stop: end the forward pass there.
    """

    def hook(_: Any, args: tuple[torch.Tensor, ...]) -> None:
        see(args[0])
        if stop:
            raise _Enough

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _norm(norm: Any, linear: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The output of a norm of its own, or of one that is fused into the linear after it."""
    if hasattr(linear, "layer_norm_weight"):
        return fused_norm(linear, hidden)
    output: torch.Tensor = norm(hidden)
    return output
