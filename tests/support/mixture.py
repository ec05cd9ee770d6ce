"""A tiny live mixture of experts in Mixtral's form, the same weights under every layout."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import torch
from support.pruning import ARCHITECTURE, SHAPE

MIXTURE = SHAPE.replace(num_layers=2, ffn_hidden_size=20, num_moe_experts=4)
TOPK = 2


def live_mixture(groups: Any, *, dtype: torch.dtype = torch.float64) -> list[Any]:
    """This rank's chunk of a random model of shape ``MIXTURE``, two of four experts a token."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from nemo_minitron.runtime.model import padded_vocab, transformer_config

    dense = MIXTURE.replace(num_moe_experts=None)
    config = dataclasses.replace(
        transformer_config(dense, ARCHITECTURE, groups.layout, dtype=dtype),
        num_moe_experts=MIXTURE.num_moe_experts,
        moe_router_topk=TOPK,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        perform_initialization=True,
    )
    chunk = GPTModel(
        config,
        transformer_layer_spec=get_gpt_layer_local_spec(
            num_experts=MIXTURE.num_moe_experts, moe_grouped_gemm=False, normalization="RMSNorm"
        ),
        vocab_size=padded_vocab(MIXTURE.vocab_size, tensor=groups.layout.tensor),
        max_sequence_length=ARCHITECTURE.max_position_embeddings,
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        position_embedding_type="rope",
    )
    first = chunk.decoder.layers[0].layer_number - 1
    for name, parameter in chunk.named_parameters():
        if name.startswith("decoder.layers."):
            layer, rest = name.removeprefix("decoder.layers.").split(".", 1)
            name = f"{int(layer) + first}.{rest}"
        parameter.data.copy_(_shard(name, parameter, groups))
    return [chunk]


def _shard(name: str, parameter: torch.Tensor, groups: Any) -> torch.Tensor:
    """This rank's part of a tensor that the name alone decides."""
    tensor, rank = groups.layout.tensor, groups.tp_rank
    split = tensor > 1 and parameter.tensor_model_parallel if hasattr(parameter, "tensor_model_parallel") else False
    shape = list(parameter.shape)
    # the true vocabulary's rows are alike whatever padding there is
    rows = MIXTURE.vocab_size if "word_embeddings" in name or "output_layer" in name else None
    if split:
        shape[parameter.partition_dim] *= tensor
    values = torch.zeros(shape, dtype=torch.float64)
    drawn = [rows, *shape[1:]] if rows else shape
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values[: drawn[0]] = 0.3 * torch.randn(drawn, generator=generator, dtype=torch.float64)
    if values.ndim == 1:
        values += 1
    if not split:
        return values
    if "linear_fc1" in name:  # gates and up-projections are cut each
        return torch.cat([part.chunk(tensor)[rank] for part in values.chunk(2)])
    return values.chunk(tensor, parameter.partition_dim)[rank]
