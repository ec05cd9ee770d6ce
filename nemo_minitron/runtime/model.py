"""Build a live Megatron-core model from a shape: the model chunks of this rank.

Scoring, pruning and evaluation use plain Megatron-core models, which start in 5 s; training uses NeMo's module around
the same model (``nemo_minitron.distillation``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from nemo_minitron.architecture import Architecture
from nemo_minitron.axes import family
from nemo_minitron.errors import ShapeError
from nemo_minitron.runtime import versions
from nemo_minitron.runtime.device import Device
from nemo_minitron.runtime.groups import Groups, ParallelLayout
from nemo_minitron.runtime.rotary import attention_settings, interpolation_factor, scale_rotary
from nemo_minitron.shape import SIZES, ModelShape, padded_vocab, require_uniform

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

__all__ = [
    "build_chunk",
    "build_model",
    "layer_specification",
    "pipeline_layer_layout",
    "place",
    "shape_of",
    "transformer_config",
]


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """``relu(x)**2``. Importing NeMo's own takes twelve seconds."""
    return torch.nn.functional.relu(x).square()


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh approximation."""
    return torch.nn.functional.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": gelu_tanh,
    "squared_relu": squared_relu,
}
"""By the name that a family's table has for them."""


def pipeline_layer_layout(shape: ModelShape, layout: ParallelLayout) -> list[list[str]] | None:
    """The parts of each pipeline stage, a value of ``pipeline_model_parallel_layout`` of Megatron and NeMo.

    With it Megatron 0.13 takes any number of layers a stage, virtual stages included; without it, all must be equal.

    Returns:
        A list for each stage: "embedding", "decoder" for each layer, "loss". The stages are in the order of the layers,
        so all pipeline ranks' first virtual stages come before the second ones. None where all stages are equal.

    Raises:
        ShapeError: if there are more stages than layers.
    """
    sizes = shape.pipeline_stage_sizes(layout.pipeline_stages)
    if len(set(sizes)) == 1:
        return None
    pipeline_stages = [["decoder"] * size for size in sizes]
    pipeline_stages[0].insert(0, "embedding")
    pipeline_stages[-1].append("loss")
    return pipeline_stages


def transformer_config(
    shape: ModelShape,
    architecture: Architecture,
    layout: ParallelLayout,
    device: Device,
    *,
    dtype: torch.dtype = torch.float32,
) -> TransformerConfig:
    """Megatron's configuration of a decoder, by its family.

    Fusions are on only with Transformer Engine's layers: Megatron's own layers have torch's norms, which refuse
    ``persist_layer_norm``, and no wheel of Megatron-core has the extension for the fused softmax.

    Raises:
        ShapeError: if the sizes and the constants contradict each other, or layers differ in size.
    """
    require_uniform(shape, "a Megatron model")
    from megatron.core.transformer import TransformerConfig

    from nemo_minitron.runtime.layer_types import note_layer_types

    fused, table = device.transformer_engine, family(architecture.family)
    faults = architecture.faults(shape) + architecture.context_faults(layout.context)
    if table.layer_types and architecture.layer_types is None:
        faults.append(f"layer_types: the family {table.name!r} has layers of two types; say which layer has which")
    if faults:
        raise ShapeError(faults)
    experts: dict[str, Any] = {}
    if shape.num_moe_experts is not None:
        if architecture.moe_router_topk == 1 and not architecture.moe_router_pre_softmax:
            raise ShapeError(
                "moe_router_topk=1: Megatron sends a token to one expert only where its weight is not normalised to 1 "
                "(norm_topk_prob=false)"
            )
        experts = {
            "num_moe_experts": shape.num_moe_experts,
            "moe_ffn_hidden_size": shape.ffn_hidden_size,
            "moe_router_topk": architecture.moe_router_topk,
            "moe_router_pre_softmax": architecture.moe_router_pre_softmax,
            # what measures and prunes must not add the loss that balances the experts in training
            "moe_router_load_balancing_type": "none",
            "moe_grouped_gemm": False,
            "expert_model_parallel_size": layout.expert,
            # the order in which an expert gets its tokens is known of this one (importance.experts)
            "moe_token_dispatcher_type": "allgather",
        }
    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        normalization=table.normalization,
        layernorm_zero_centered_gamma=table.zero_centered_norm,
        layernorm_epsilon=architecture.norm_epsilon,
        gated_linear_unit=table.gated,
        activation_func=ACTIVATIONS[table.activation],
        add_bias_linear=False,
        add_qkv_bias=table.qkv_bias,
        qk_layernorm=table.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        **versions.layer_layout(pipeline_layer_layout(shape, layout)),
        sequence_parallel=layout.sequence_parallel,
        # Of two stages each is the other's next and previous: in one batch of messages, activations and gradients would
        # be taken for each other. Overlapped sends are still under way when the schedule frees their tensors, which
        # gloo does not guard against.
        overlap_p2p_comm=layout.virtual_pipeline is not None,
        batch_p2p_comm=layout.virtual_pipeline is None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=not device.is_cuda,
        # Of these activations Megatron fuses the gated SiLU only
        bias_activation_fusion=fused and table.gated and table.activation == "silu",
        masked_softmax_fusion=fused,
        persist_layer_norm=fused,
        bias_dropout_fusion=fused,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        deallocate_pipeline_outputs=device.is_cuda or layout.virtual_pipeline is None,
        variable_seq_lengths=False,
        perform_initialization=False,
        **attention_settings(architecture, shape.head_dim),
        **experts,
    )
    note_layer_types(config, architecture)
    return config


def shape_of(config: Any, *, vocab_size: int = 1, tied_embeddings: bool = False) -> ModelShape:
    """The sizes in a configuration of Megatron's or NeMo's: the inverse of :func:`transformer_config`.

    Args:
        config: a ``TransformerConfig``, or one derived from it.
        vocab_size, tied_embeddings: of the model; the configuration does not have them.

    Raises:
        ShapeError: if the sizes are impossible.
    """
    sizes = {name: getattr(config, name) for name in SIZES}
    if config.num_moe_experts is not None and config.moe_ffn_hidden_size is not None:
        sizes["ffn_hidden_size"] = config.moe_ffn_hidden_size
    sizes["num_query_groups"] = config.num_query_groups or config.num_attention_heads
    head_dim = config.kv_channels or config.hidden_size // config.num_attention_heads
    return ModelShape(**sizes, head_dim=head_dim, vocab_size=vocab_size, tied_embeddings=tied_embeddings)


def build_model(
    shape: ModelShape,
    architecture: Architecture,
    groups: Groups,
    *,
    dtype: torch.dtype = torch.float32,
    initialize: bool = False,
) -> list[GPTModel]:
    """This rank's chunks of a model: one, or one for each virtual pipeline stage.

    Args:
        shape: global sizes.
        architecture: constants.
        groups: of this process.
        dtype: of the parameters.
        initialize: draw random weights; leave it off where weights are loaded at once.

    Returns:
        Chunks in the order of Megatron's interleaved schedule; weights are uninitialised unless ``initialize`` is set.

    Raises:
        ShapeError: if the layout cannot split the shape.
    """
    from megatron.core import parallel_state

    layout = groups.layout
    if faults := shape.layout_faults(tensor=layout.tensor, pipeline=layout.pipeline_stages, expert=layout.expert):
        raise ShapeError(faults)
    config = transformer_config(shape, architecture, layout, groups.device, dtype=dtype)
    config.perform_initialization = initialize
    chunks = []
    for index in range(layout.virtual_pipeline or 1):
        stage = versions.virtual_pipeline_stage(index if layout.virtual_pipeline else None)
        chunks.append(
            build_chunk(
                config,
                shape,
                architecture,
                groups,
                first=parallel_state.is_pipeline_first_stage(ignore_virtual=False, **stage),
                last=parallel_state.is_pipeline_last_stage(ignore_virtual=False, **stage),
                stage=stage,
            )
        )
    return chunks


def build_chunk(
    config: TransformerConfig,
    shape: ModelShape,
    architecture: Architecture,
    groups: Groups,
    *,
    first: bool,
    last: bool,
    stage: Mapping[str, Any] | None = None,
) -> GPTModel:
    """A chunk of a model; see :func:`build_model`.

    Args:
        config: as :func:`transformer_config` gives it; its ``params_dtype`` is that of the parameters.
        shape, architecture, groups: of the model, and of this process.
        first: the chunk has the embedding.
        last: it has the final norm and the output layer.
        stage: what :func:`nemo_minitron.runtime.versions.virtual_pipeline_stage` gives.
    """
    from megatron.core.models.gpt import GPTModel

    from nemo_minitron.runtime.layer_types import complete

    chunk = GPTModel(
        config,
        transformer_layer_spec=layer_specification(config, architecture, groups),
        vocab_size=padded_vocab(shape.vocab_size, tensor=groups.layout.tensor),
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=first,
        post_process=last,
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_percent=architecture.rotary_percent,
        rotary_base=architecture.rotary_base,
        seq_len_interpolation_factor=interpolation_factor(architecture),
        **(stage or {}),
    )
    place(chunk, groups.device.torch, config.params_dtype)
    scale_rotary(chunk.rotary_pos_emb, architecture)
    complete(chunk, architecture)
    return chunk


def layer_specification(config: TransformerConfig, architecture: Architecture, groups: Groups) -> Any:
    """Megatron's specification of a decoder layer, with what the family has beside."""
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )

    from nemo_minitron.runtime.layer_types import with_family_parts

    fused = groups.device.transformer_engine
    parts: dict[str, Any] = {"num_experts": config.num_moe_experts, "qk_layernorm": config.qk_layernorm}
    spec: Any = (
        get_gpt_layer_with_transformer_engine_spec(**parts)
        if fused
        else get_gpt_layer_local_spec(**parts, normalization=config.normalization)
    )
    spec = with_family_parts(spec, architecture, transformer_engine=fused)
    if groups.layout.context > 1 and not fused:
        from nemo_minitron.runtime.context_attention import with_context_attention

        spec = with_context_attention(spec)
    return spec


def place(chunk: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Put every parameter on the device and into the dtype of the others.

    The norms of Megatron's own layers are torch's, which are made on the CPU and in float32 whatever the model is; so
    is a router. Megatron's trainers move the whole model afterwards.
    """
    for part in chunk.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            # A model that is made under torch.device("meta") has sizes and no numbers that could be moved.
            place = parameter.device if parameter.is_meta else device
            if parameter.device != place or parameter.dtype != dtype:
                placed = torch.nn.Parameter(parameter.detach().to(device=place, dtype=dtype))
                for mark, value in vars(parameter).items():  # Megatron's: sequence_parallel
                    vars(placed).setdefault(mark, value)
                setattr(part, name, placed)
