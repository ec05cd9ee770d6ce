"""Read and change the sizes of live Megatron modules: where a ``GPTModel`` keeps them.

Megatron copies sizes from the shared ``TransformerConfig`` into its modules when they are built. :func:`apply_sizes`
sets every one of those copies, so that a resized model is, attribute by attribute, the one that would have been built.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from nemo_minitron import axes
from nemo_minitron.architecture import types_of
from nemo_minitron.checkpoints.live import canonical_parameters
from nemo_minitron.errors import ShapeError
from nemo_minitron.runtime import versions
from nemo_minitron.runtime.groups import ParallelLayout
from nemo_minitron.runtime.model import pipeline_layer_layout, shape_of
from nemo_minitron.shape import SIZES, ModelShape

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

__all__ = [
    "apply_config",
    "apply_layer_types",
    "apply_sizes",
    "apply_pipeline_stages",
    "like_parameter",
    "gpt_chunks",
    "kept_types",
    "layer_types_of",
    "live_family",
    "live_shape",
    "owned_parameters",
    "set_pipeline_stages",
]

#: What gradient buffers and optimizers put on a parameter.
_TRAINING_MARKS = ("main_grad", "grad_added_to_main_grad", "main_param", "main_param_sharded")


def gpt_chunks(module: nn.Module) -> list[GPTModel]:
    """The Megatron ``GPTModel`` chunks inside ``module``: itself, or below NeMo's and Megatron's wrappers.

    Raises:
        ShapeError: if there is none.
    """
    from megatron.core.models.gpt import GPTModel

    chunks = [part for part in module.modules() if isinstance(part, GPTModel)]
    if not chunks:
        raise ShapeError(f"{type(module).__name__}: holds no Megatron GPTModel; only those can be pruned")
    return chunks


def like_parameter(parameter: nn.Parameter, data: torch.Tensor) -> nn.Parameter:
    """A new parameter with the content ``data`` and the attributes that Megatron's layers put on ``parameter``."""
    new = nn.Parameter(data.contiguous(), requires_grad=parameter.requires_grad)
    # tensor_model_parallel, partition_dim, partition_stride, allreduce, shared, shared_embedding, ...
    vars(new).update({name: mark for name, mark in vars(parameter).items() if name not in _TRAINING_MARKS})
    return new


def owned_parameters(chunk: GPTModel) -> Iterator[tuple[str, nn.Parameter, list[tuple[nn.Module, str]]]]:
    """Each parameter of a chunk: canonical name, the parameter, and all modules that hold it with the name there.

    A parameter that the caller replaces is freed before the next one comes.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in chunk.modules():
        for leaf, parameter in part.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((part, leaf))
    # No reference to a parameter may stay here.
    places = [(name, owners[id(parameter)]) for name, parameter in canonical_parameters(chunk)]
    del owners, parameter
    for name, held in places:
        yield name, getattr(*held[0]), held


def live_shape(chunk: GPTModel) -> ModelShape:
    """The sizes of the whole model that a chunk is part of. The vocabulary's is the padded one."""
    return shape_of(
        chunk.config, vocab_size=chunk.vocab_size, tied_embeddings=chunk.share_embeddings_and_output_weights
    )


def live_family(chunk: GPTModel) -> axes.Family:
    """The family whose axes table has the parameters of the chunk's layers, and no others.

    Raises:
        ShapeError: if there is none.
    """
    names = {
        _of_any_expert(name.split(".", 3)[3])
        for name, _ in canonical_parameters(chunk)
        if name.startswith("decoder.layers.")
    }
    tables = {
        table.name: {_of_any_expert(name) for name in axes.layer_parameters(table, live_shape(chunk))}
        for table in axes.FAMILIES.values()
    }
    for name, parameters in tables.items():
        if parameters == names and axes.family(name).gated == chunk.config.gated_linear_unit:
            return axes.family(name)
    known = set().union(*tables.values())
    which = f"{sorted(names - known)[0]} is in none of them" if names - known else "its parameters are not those of any"
    raise ShapeError(
        f"the model fits no axes table ({', '.join(axes.FAMILIES)}): {which}; "
        "add its family, see docs/model-families.md"
    )


def _of_any_expert(name: str) -> str:
    """A name below a layer, whichever expert it is of: a rank need not hold all."""
    if not name.startswith(axes.EXPERTS):
        return name
    return axes.EXPERTS + name.removeprefix(axes.EXPERTS).split(".", 1)[1]


def apply_config(module: nn.Module, target: ModelShape) -> None:
    """Set the sizes in the configuration of ``module`` and of all its submodules."""
    for config in _configs(module):
        for name in SIZES:
            if hasattr(config, name):
                setattr(config, name, getattr(target, name))
        if hasattr(config, "kv_channels"):
            config.kv_channels = target.head_dim
        if hasattr(config, "moe_ffn_hidden_size") and target.num_moe_experts is not None:
            config.moe_ffn_hidden_size = target.ffn_hidden_size


def layer_types_of(config: Any) -> tuple[str, ...] | None:
    """The types of the layers in a configuration, as this suite notes them or by NeMo's pattern; None without types."""
    if (stated := getattr(config, "layer_types", None)) is not None:
        return tuple(stated)
    pattern = getattr(config, "interleaved_attn_pattern", None)
    return None if pattern is None else types_of(sum(pattern), config.num_layers)


def kept_types(config: Any, layers: Sequence[int]) -> tuple[str, ...] | None:
    """The types of the layers that stay.

    Raises:
        ShapeError: if the configuration is one of NeMo's, whose layers take their types from their numbers, and the
            types would not be those of the layers.
    """
    if (types := layer_types_of(config)) is None:
        return None
    kept, pattern = tuple(types[layer] for layer in layers), getattr(config, "interleaved_attn_pattern", None)
    if pattern is not None and kept != (given := types_of(sum(pattern), len(kept))):
        raise ShapeError(
            f"kept layers {list(layers)}: each layer keeps its type, {', '.join(kept)}, but NeMo's "
            f"interleaved_attn_pattern={pattern} gives {', '.join(given)}; keep layers whose types follow the pattern, "
            "or prune the checkpoint (`minitron prune`)"
        )
    return kept


def apply_layer_types(module: nn.Module, types: tuple[str, ...] | None) -> None:
    """Set the types of the layers in the configuration of ``module`` and of all its submodules, if they are noted."""
    for config in _configs(module):
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = types


def apply_pipeline_stages(module: nn.Module, target: ModelShape, layout: ParallelLayout) -> None:
    """Set the layers of each pipeline stage in the configuration of ``module`` and of all its submodules."""
    for config in _configs(module):
        if hasattr(config, "pipeline_model_parallel_layout"):
            set_pipeline_stages(config, target, layout)


def set_pipeline_stages(config: Any, target: ModelShape, layout: ParallelLayout) -> None:
    """Set the layers of each pipeline stage in a Megatron configuration, as ``runtime.model.build_model`` does.

    Other settings for uneven stages are reset.
    """
    for name, pipeline_stages in versions.layer_layout(pipeline_layer_layout(target, layout)).items():
        from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

        setattr(config, name, pipeline_stages and PipelineParallelLayerLayout(pipeline_stages, layout.pipeline))
    config.num_layers_in_first_pipeline_stage = config.num_layers_in_last_pipeline_stage = None
    config.account_for_embedding_in_pipeline_split = config.account_for_loss_in_pipeline_split = False


def _configs(module: nn.Module) -> list[Any]:
    return list({id(part.config): part.config for part in module.modules() if hasattr(part, "config")}.values())


def apply_sizes(chunks: Iterable[GPTModel], target: ModelShape, *, tensor: int) -> None:
    """Set every size that the chunks keep to that of ``target``. Parameters are not touched.

    Args:
        chunks: their layers are already those that stay, their configuration is the target's (:func:`apply_config`).
        target: sizes of the whole model.
        tensor: tensor-parallel size.
    """
    for chunk in chunks:
        _resize_chunk(chunk, target, tensor)


def _resize_chunk(chunk: GPTModel, target: ModelShape, tensor: int) -> None:
    hidden = target.hidden_size
    chunk.vocab_size = target.vocab_size
    if chunk.pre_process:
        chunk.embedding.vocab_size = target.vocab_size
        _embedding(chunk.embedding.word_embeddings, target.vocab_size, hidden, tensor)
    if chunk.post_process:
        _column(chunk.output_layer, hidden, target.vocab_size, tensor)
    decoder = chunk.decoder
    decoder.num_layers_per_pipeline_rank = len(decoder.layers)
    if decoder.final_layernorm is not None:
        _norm(decoder.final_layernorm, hidden)
    for layer in decoder.layers:
        _resize_layer(layer, target, tensor)


def _resize_layer(layer: Any, target: ModelShape, tensor: int) -> None:
    hidden = target.hidden_size
    queries, keys = target.num_attention_heads * target.head_dim, target.num_query_groups * target.head_dim
    attention = layer.self_attention
    _norm(layer.input_layernorm, hidden)
    _norm(layer.pre_mlp_layernorm, hidden)
    attention.query_projection_size = queries
    attention.kv_projection_size = keys
    attention.num_attention_heads_per_partition = target.num_attention_heads // tensor
    attention.num_query_groups_per_partition = target.num_query_groups // tensor
    _column(attention.linear_qkv, hidden, queries + 2 * keys, tensor)
    _row(attention.linear_proj, queries, hidden, tensor)
    if target.num_moe_experts is None:
        _resize_mlp(layer.mlp, target, tensor)
    else:
        _resize_mixture(layer.mlp, target, tensor)
    for linear in (attention.linear_proj, getattr(layer.mlp, "linear_fc2", None)):
        if (norm := getattr(linear, "post_layernorm", None)) is not None:
            _norm(norm, hidden)
    _rebuild_core_attention(layer)


def _resize_mlp(mlp: Any, target: ModelShape, tensor: int) -> None:
    hidden, ffn = target.hidden_size, target.ffn_hidden_size
    mlp.input_size = hidden
    _column(mlp.linear_fc1, hidden, ffn * (2 if mlp.config.gated_linear_unit else 1), tensor)
    _row(mlp.linear_fc2, ffn, hidden, tensor)


def _resize_mixture(mixture: Any, target: ModelShape, tensor: int) -> None:
    from megatron.core.transformer.moe.moe_utils import get_default_model_comm_pgs

    experts, group = target.num_moe_experts or 0, mixture.ep_group
    count, rank = experts // dist.get_world_size(group), dist.get_rank(group)
    mixture.router.num_experts = experts
    mixture.num_local_experts = mixture.experts.num_local_experts = count
    mixture.local_expert_indices = list(range(rank * count, (rank + 1) * count))
    for expert in mixture.experts.local_experts:
        _resize_mlp(expert, target, tensor)
    # Dispatchers have no parameters: as for core attention.
    mixture.token_dispatcher = type(mixture.token_dispatcher)(
        count, mixture.local_expert_indices, config=mixture.config, model_comm_pgs=get_default_model_comm_pgs()
    )


def _rebuild_core_attention(layer: Any) -> None:
    """Build core attention anew: it has no parameters, and its constructor derives all from the new head counts."""
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


def _embedding(table: Any, rows: int, hidden: int, tensor: int) -> None:
    """Sizes of a vocabulary-parallel embedding."""
    table.embedding_dim, table.num_embeddings = hidden, rows
    table.num_embeddings_per_partition = rows // tensor
    table.vocab_start_index = dist.get_rank(table.tp_group) * (rows // tensor)
    table.vocab_end_index = table.vocab_start_index + rows // tensor


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
