"""Tiny random transformers models of every family, and kept units for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nemo_minitron import axes
from nemo_minitron.axes import KeptUnits
from nemo_minitron.shape import ModelShape

SIZES: dict[str, Any] = {
    "vocab_size": 131,  # odd: every NeMo format has to pad it
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 12,  # 8 x 12 = 96, not the hidden size
    "max_position_embeddings": 64,
    "rope_theta": 20000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _own(table: axes.Family) -> dict[str, Any]:
    """Settings that this family has beside :data:`SIZES`. Embeddings are tied in the families with QK norms."""
    found: dict[str, Any] = {}
    if table.qk_layernorm:
        found["tie_word_embeddings"] = True
    if table.partial_rotary:
        found["partial_rotary_factor"] = 0.5
    if table.layer_types:
        # the middle layer has full attention; the window is shorter than the texts of the tests
        found |= {
            "sliding_window": 5,
            "sliding_window_pattern": 2,
            "rope_local_base_freq": 500.0,
            "query_pre_attn_scalar": 20,
        }
    if table.expert:
        assert table.hf is not None
        found |= {table.hf.experts: 4, "num_experts_per_tok": 2, table.hf.width: 24}
    return found


#: By family: what its tiny model is configured with, and the beginning of the names of transformers' classes.
OWN = {name: _own(table) for name, table in axes.FAMILIES.items()}
CLASSES = {name: table.hf.architecture.removesuffix("ForCausalLM") for name, table in axes.FAMILIES.items() if table.hf}


def family_model(family: str, path: Path, *, seed: int = 0, name: str | None = None, **changes: Any) -> Path:
    """A random model of a family, saved by transformers at ``path``; norms and biases are random too.

    ``changes`` are other values, or further keys, of its configuration; ``name`` begins the name of another class.
    """
    import transformers

    torch.manual_seed(seed)
    kind = name.lower() if name else axes.family(family).hf.model_type
    config = transformers.AutoConfig.for_model(kind, **SIZES | OWN[family] | changes)
    model = getattr(transformers, f"{name or CLASSES[family]}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if parameter.ndim == 1 and not name.endswith("bias") and not axes.family(family).zero_centered_norm:
                parameter.add_(1.0)
    model.save_pretrained(path)
    return path


def windowed_model(path: Path, *, seed: int = 0, **changes: Any) -> Path:
    """:func:`family_model` of Mistral, which reads as the family ``llama``, with a window shorter than the tests'
    texts."""
    return family_model("llama", path, seed=seed, name="Mistral", **{"sliding_window": 5, **changes})


def some_units(shape: ModelShape, *, seed: int = 3) -> KeptUnits:
    """Units that stay when every axis is pruned at once: 2 of 3 layers, 36 of 48 channels, half the groups, heads,
    neurons (others in each expert) and 3 of 4 experts."""
    generator = torch.Generator().manual_seed(seed)

    def some(size: int, count: int) -> tuple[int, ...]:
        return tuple(sorted(torch.randperm(size, generator=generator)[:count].tolist()))

    layers = some(shape.num_layers, 2)
    q, neurons, experts = shape.heads_per_group, shape.ffn_hidden_size, shape.num_moe_experts
    groups = tuple(some(shape.num_query_groups, 2) for _ in layers)
    dense = experts is None
    return KeptUnits(
        layers=layers,
        hidden=some(shape.hidden_size, 36),
        ffn=tuple(some(neurons, neurons // 2) if dense else () for _ in layers),
        groups=groups,
        heads=tuple(tuple(tuple(g * q + h for h in some(q, q // 2)) for g in row) for row in groups),
        experts=None if dense else tuple(some(experts, 3) for _ in layers),
        expert_ffn=None if dense else tuple(tuple(some(neurons, neurons // 2) for _ in range(3)) for _ in layers),
    )
