"""Live layers of the models that Megatron-core's own specifications do not cover.

Gemma 3 has layers of two types: full attention, and attention within a sliding window, each type with rotary embeddings
of its own. It also normalises the outputs of attention and MLP, and scales the embeddings. Megatron-core has all the
parts, and NeMo puts them together for Transformer Engine, with types by a fixed pattern. Here the types are a list,
which depth pruning shortens, and the attention of Megatron's own layers obeys the window too. Mistral has the windows
alone, in every layer.

A module asks the configuration for the type of its layer, by its number in the whole model, whenever it runs. So
pipeline stages, and layers that move and are numbered anew, need no further care. The list is an attribute that
:func:`note_layer_types` puts on the configuration; Megatron's class has no field for it.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec

from nemo_minitron.architecture import SLIDING, Architecture
from nemo_minitron.axes import family
from nemo_minitron.runtime.masks import within_window

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

__all__ = [
    "RotaryByType",
    "ScaledEmbedding",
    "TypedSelfAttention",
    "WindowAttention",
    "complete",
    "note_layer_types",
    "with_family_parts",
]


def note_layer_types(config: TransformerConfig, architecture: Architecture) -> None:
    """Put the types of the layers and the window on a configuration; None in families without types."""
    vars(config).update(layer_types=architecture.layer_types, sliding_window=architecture.sliding_window)


def _slides(module: Any) -> bool:
    """Whether the layer that a module belongs to attends within the window."""
    return bool(module.config.layer_types[module.layer_number - 1] == SLIDING)


def with_family_parts(spec: ModuleSpec, architecture: Architecture, *, transformer_engine: bool) -> ModuleSpec:
    """A layer specification of Megatron's with what the family has beside: norms of the outputs, types of layers.

    Args:
        spec: made for this call: it is changed.
        architecture: constants of the model.
        transformer_engine: the specification is of Transformer Engine's layers.
    """
    table, attention = family(architecture.family), spec.submodules.self_attention
    if table.post_norms:
        norm = _te_norm() if transformer_engine else spec.submodules.input_layernorm
        mlp = spec.submodules.mlp.submodules
        for part, name in ((attention.submodules, "linear_proj"), (mlp, "linear_fc2")):
            setattr(part, name, _with_post_norm(getattr(part, name), norm))
    if architecture.layer_types is not None:
        if not architecture.windowed:
            attention.module = TypedSelfAttention
        attention.submodules.core_attention = _te_window_attention() if transformer_engine else WindowAttention
    return spec


def complete(chunk: GPTModel, architecture: Architecture) -> None:
    """Give a built chunk the embeddings of its family: scaled ones, rotary ones of both types of layers."""
    table = family(architecture.family)
    if table.scaled_embedding and hasattr(chunk, "embedding"):
        # Another object would hold a second table of the vocabulary for a moment, a fifth of a small model.
        chunk.embedding.__class__ = ScaledEmbedding
    if architecture.layer_types is not None and not architecture.windowed:
        config = chunk.config
        sliding = RotaryEmbedding(
            kv_channels=config.kv_channels,
            rotary_percent=architecture.rotary_percent,
            rotary_interleaved=config.rotary_interleaved,
            rotary_base=architecture.rotary_base_local,
            use_cpu_initialization=config.use_cpu_initialization,
        )
        chunk.rotary_pos_emb = RotaryByType(chunk.rotary_pos_emb, sliding)


class ScaledEmbedding(LanguageModelEmbedding):
    """Word embeddings, ``[s (/tp), b, H]``, times the root of the hidden size.

    As in transformers (``Gemma3TextScaledWordEmbedding``) the factor is rounded to the dtype of the weights and follows
    from the hidden size at hand, a pruned one too.
    """

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As of Megatron's class."""
        embeddings: torch.Tensor = super().forward(*args, **kwargs)
        return embeddings * torch.tensor(self.config.hidden_size**0.5, dtype=self.word_embeddings.weight.dtype)


class RotaryByType(torch.nn.Module):
    """Rotary embeddings of both types of layers, as one tensor ``[s, 1, 1, 2 d]``: sliding layers' first.

    One tensor, because recomputation passes on nothing else.

    Args:
        full, sliding: of layers with full attention, and of those that slide.
    """

    def __init__(self, full: RotaryEmbedding, sliding: RotaryEmbedding) -> None:
        super().__init__()
        self.full, self.sliding = full, sliding

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As of Megatron's class."""
        return torch.cat([self.sliding(*args, **kwargs), self.full(*args, **kwargs)], dim=-1)

    def get_rotary_seq_len(self, *args: Any) -> int:
        """As of Megatron's class."""
        length: int = self.full.get_rotary_seq_len(*args)
        return length


class TypedSelfAttention(SelfAttention):
    """Self-attention with the rotary embeddings of its layer's type, out of :class:`RotaryByType`'s tensor."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        rotary_pos_emb: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As of Megatron's class."""
        if rotary_pos_emb is not None:
            rotary_pos_emb = rotary_pos_emb.chunk(2, dim=-1)[0 if _slides(self) else 1]
        attended: tuple[torch.Tensor, torch.Tensor | None] = super().forward(
            hidden_states, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **kwargs
        )
        return attended


class WindowAttention(DotProductAttention):
    """Megatron's own core attention, which in a sliding layer sees the last ``sliding_window`` tokens alone."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        plain = copy.copy(config)
        plain.window_size = None  # a number in NeMo's configurations, which Megatron's class refuses
        super().__init__(plain, *args, **kwargs)
        self.config = config

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As of Megatron's class: ``[sq, b, A/tp, d]``, ``[sk, b, G/tp, d]`` twice, mask -> ``[sq, b, A d / tp]``."""
        if _slides(self):
            attention_mask = within_window(attention_mask, query, key, self.config.sliding_window)
        attended: torch.Tensor = super().forward(query, key, value, attention_mask, *args, **kwargs)
        return attended


def _te_norm() -> Any:
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


@cache
def _te_window_attention() -> type:
    """Transformer Engine's core attention with the window of its layer."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    class TEWindowAttention(TEDotProductAttention):  # type: ignore[misc]
        def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
            own: Any = copy.copy(config)
            slides = own.layer_types[layer_number - 1] == SLIDING
            own.window_size = (own.sliding_window - 1, 0) if slides else None  # tokens before a query's own
            super().__init__(own, layer_number, *args, **kwargs)

        def forward(self, query: Any, key: Any, value: Any, attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
            mask_type = args[0] if args else kwargs.get("attn_mask_type")
            if mask_type is AttnMaskType.arbitrary and self.config.window_size is not None:
                attention_mask = within_window(attention_mask, query, key, self.config.window_size[0] + 1)
            return super().forward(query, key, value, attention_mask, *args, **kwargs)

    return TEWindowAttention


@cache
def _with_post_norm(linear: type, norm: Any) -> type:
    """A row-parallel linear whose output is normalised, with NeMo's name for the norm (``gemma2.py``)."""

    class RowParallelLinearNorm(linear):  # type: ignore[misc, valid-type]
        def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
            super().__init__(input_size, output_size, config=config, **kwargs)
            self.post_layernorm = norm(config, output_size, eps=config.layernorm_epsilon)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            output, bias = super().forward(x)
            return self.post_layernorm(output), bias

    return RowParallelLinearNorm
