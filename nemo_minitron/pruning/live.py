"""Reading and resizing live Megatron modules: what sizes a ``GPTModel`` has, and where it keeps them.

Megatron copies sizes from the shared ``TransformerConfig`` into its modules when they are built. :func:`apply_sizes`
sets every one of those copies, so that a resized model is, attribute by attribute, the one that would have been built.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from nemo_minitron.errors import ShapeError
from nemo_minitron.runtime.groups import Groups, ParallelLayout, current
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

__all__ = ["apply_sizes", "current_groups", "gpt_chunks", "live_shape"]

_CONFIG_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")


def gpt_chunks(module: nn.Module) -> list[GPTModel]:
    """The Megatron ``GPTModel`` chunks inside ``module``: itself, or below NeMo's and Megatron's wrappers.

    Raises:
        ShapeError: if there is none, or they are already wrapped for training.
    """
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.gpt import GPTModel

    chunks = [part for part in module.modules() if isinstance(part, GPTModel)]
    if not chunks:
        raise ShapeError(f"{type(module).__name__}: holds no Megatron GPTModel; only those can be pruned")
    wrapped = any(isinstance(part, DistributedDataParallel) for part in module.modules())
    if wrapped or any(hasattr(parameter, "main_grad") for chunk in chunks for parameter in chunk.parameters()):
        raise ShapeError(
            "the model is already wrapped in Megatron's DistributedDataParallel, whose gradient buffers (and the "
            "optimizer) hold the unpruned parameters; prune it before it is wrapped"
        )
    return chunks


def live_shape(chunk: GPTModel) -> ModelShape:
    """The sizes of the whole model that a chunk is part of. The vocabulary's is the padded one."""
    config = chunk.config
    return ModelShape(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        head_dim=config.kv_channels,
        vocab_size=chunk.vocab_size,
        tied_embeddings=chunk.share_embeddings_and_output_weights,
    )


def current_groups() -> Groups:
    """The groups and the layout that Megatron's parallel state holds.

    Raises:
        ShapeError: if Megatron's parallel state is not initialised.
    """
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        raise ShapeError("Megatron's parallel state is not initialised; start it, or pass groups=")
    return current(
        ParallelLayout(
            tensor=parallel_state.get_tensor_model_parallel_world_size(),
            pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
            data=parallel_state.get_data_parallel_world_size(),
            virtual_pipeline=parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        )
    )


def apply_sizes(module: nn.Module, chunks: Iterable[GPTModel], target: ModelShape, *, tensor: int) -> None:
    """Set every size that ``module`` and the chunks in it keep, to those of ``target``. Parameters are not touched.

    Args:
        module: what the chunks are wrapped in; its configurations change too.
        chunks: in ``module``; their layers are already those that stay.
        target: sizes of the whole model.
        tensor: tensor-parallel size.
    """
    configs = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    for config in configs.values():
        for name in _CONFIG_SIZES:
            if hasattr(config, name):
                setattr(config, name, getattr(target, name))
        if hasattr(config, "kv_channels"):
            config.kv_channels = target.head_dim
    for chunk in chunks:
        _resize_chunk(chunk, target, tensor)


def _resize_chunk(chunk: GPTModel, target: ModelShape, tensor: int) -> None:
    hidden = target.hidden_size
    if chunk.pre_process:
        chunk.embedding.word_embeddings.embedding_dim = hidden
    if chunk.post_process:
        _column(chunk.output_layer, hidden, chunk.output_layer.output_size, tensor)
    decoder = chunk.decoder
    decoder.num_layers_per_pipeline_rank = len(decoder.layers)
    if decoder.final_layernorm is not None:
        _norm(decoder.final_layernorm, hidden)
    for layer in decoder.layers:
        _resize_layer(layer, target, tensor)


def _resize_layer(layer: Any, target: ModelShape, tensor: int) -> None:
    hidden, ffn = target.hidden_size, target.ffn_hidden_size
    queries, keys = target.num_attention_heads * target.head_dim, target.num_query_groups * target.head_dim
    attention, mlp = layer.self_attention, layer.mlp
    _norm(layer.input_layernorm, hidden)
    _norm(layer.pre_mlp_layernorm, hidden)
    attention.query_projection_size = queries
    attention.kv_projection_size = keys
    attention.num_attention_heads_per_partition = target.num_attention_heads // tensor
    attention.num_query_groups_per_partition = target.num_query_groups // tensor
    _column(attention.linear_qkv, hidden, queries + 2 * keys, tensor)
    _row(attention.linear_proj, queries, hidden, tensor)
    mlp.input_size = hidden
    _column(mlp.linear_fc1, hidden, ffn * (2 if mlp.config.gated_linear_unit else 1), tensor)
    _row(mlp.linear_fc2, ffn, hidden, tensor)
    _rebuild_core_attention(layer)


def _rebuild_core_attention(layer: Any) -> None:
    """Core attention has no parameters: its own constructor knows best what follows from the new head counts."""
    from megatron.core.transformer.spec_utils import build_module

    attention = layer.self_attention
    was = attention.core_attention
    attention.core_attention = build_module(
        layer.submodules_config.self_attention.submodules.core_attention,
        config=attention.config,
        layer_number=attention.layer_number,
        attn_mask_type=attention.attn_mask_type,
        attention_type=attention.attention_type,
        softmax_scale=attention.config.softmax_scale,
        model_comm_pgs=attention.model_comm_pgs,
    ).train(was.training)


def _column(linear: Any, inputs: int, outputs: int, tensor: int) -> None:
    """Sizes of a column-parallel linear; the second line's names are Transformer Engine's."""
    _set(linear, input_size=inputs, output_size=outputs, output_size_per_partition=outputs // tensor)
    _set(linear, in_features=inputs, out_features=outputs // tensor)


def _row(linear: Any, inputs: int, outputs: int, tensor: int) -> None:
    """Sizes of a row-parallel linear; the second line's names are Transformer Engine's."""
    _set(linear, input_size=inputs, output_size=outputs, input_size_per_partition=inputs // tensor)
    _set(linear, in_features=inputs // tensor, out_features=outputs)


def _norm(norm: Any, hidden: int) -> None:
    """Size of a normalisation: torch's ``normalized_shape``, Megatron's fused layer norm's ``hidden_size``."""
    _set(norm, normalized_shape=(hidden,), hidden_size=hidden)


def _set(module: Any, **sizes: Any) -> None:
    for name, size in sizes.items():
        if hasattr(module, name):
            setattr(module, name, size)
