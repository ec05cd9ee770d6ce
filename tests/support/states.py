"""The states inside transformers' models."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["watch"]


def watch(model: Any) -> dict[str, torch.Tensor]:
    """States of a Llama's next passes, ``[b, s, H]``, by name: "embedding", "layer 3", and "q 3", "k 3", "v 3"."""
    states: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: states.update({name: output[0] if isinstance(output, tuple) else output})

    model.model.embed_tokens.register_forward_hook(keep("embedding"))
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(keep(f"layer {index}"))
        for letter in "qkv":
            getattr(layer.self_attn, f"{letter}_proj").register_forward_hook(keep(f"{letter} {index}"))
    return states
