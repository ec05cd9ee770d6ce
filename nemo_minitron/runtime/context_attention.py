"""Attention of context-parallel ranks, each with a part of every sequence, without Transformer Engine.

Megatron-core's own ``DotProductAttention`` refuses context parallelism. Here it is given what it needs: its rank's
queries, and the keys and values of all ranks. On CUDA, Transformer Engine's attention does context parallelism itself,
and never holds the keys of a whole sequence.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ModelCommProcessGroups
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec

from nemo_minitron.runtime.context import whole_sequence

__all__ = ["ContextParallelAttention", "context_layer_spec", "with_context_attention"]


class ContextParallelAttention(MegatronModule):
    """The core of the attention of a context-parallel rank.

    Keys and values are gathered over the context-parallel group (backward: a reduce-scatter of their gradients) and
    brought into the order of the sequence; the mask then says by true positions what a query may look at.

    Memory: of a layer the whole sequence's keys and values, ``[s, b, G/tp, d]`` each, and probabilities
    ``[b A/tp, s/cp, s]``. Communication: both, once forward and once backward.

    Args:
        config: with ``context_parallel_size``.
        layer_number, attn_mask_type, attention_type, options: as of Megatron's ``DotProductAttention``.
        cp_comm_type: an option of Transformer Engine; ignored, since there is only one way here.
        model_comm_pgs: with the tensor- and context-parallel groups; None for those of Megatron's parallel state.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        cp_comm_type: str | None = None,
        model_comm_pgs: ModelCommProcessGroups | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config=config)
        self._group = parallel_state.get_context_parallel_group() if model_comm_pgs is None else model_comm_pgs.cp
        whole = copy.copy(config)
        whole.context_parallel_size = 1
        self.attention = DotProductAttention(
            config=whole,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type=attention_type,
            model_comm_pgs=model_comm_pgs,
            **options,
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor,
        **options: Any,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: ``[s/cp, b, A/tp, d]``, this rank's tokens.
            key, value: ``[s/cp, b, G/tp, d]``.
            attention_mask: ``[b or 1, 1, s/cp, s]`` bool, True where attention is not allowed; keys in the order of the
                sequence.
            options: as of Megatron's ``DotProductAttention``.

        Returns:
            ``[s/cp, b, A d / tp]``.
        """
        # One message for both, as they have one shape.
        both = whole_sequence(torch.cat([key, value], dim=-1), self._group)
        key, value = (part.contiguous() for part in both.split([key.shape[-1], value.shape[-1]], dim=-1))
        attended: torch.Tensor = self.attention(query, key, value, attention_mask, **options)
        return attended


def with_context_attention(spec: ModuleSpec) -> ModuleSpec:
    """A layer of Megatron's local specification, with :class:`ContextParallelAttention` as its core attention."""
    spec.submodules.self_attention.submodules.core_attention = ContextParallelAttention
    return spec


def context_layer_spec(config: Any) -> ModuleSpec:
    """``transformer_layer_spec`` of a NeMo ``GPTConfig``: the local layer with :class:`ContextParallelAttention`."""
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    return with_context_attention(spec)
