"""NeMo 2's models with layer types, built from this suite's layers.

NeMo's own (``Gemma3Config``) exist for Transformer Engine only, take a layer's type from its number, and allow no
virtual pipeline. ``MistralConfig7B`` gives its window to Transformer Engine's layers, and Megatron's own refuse it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo_minitron.architecture import SLIDING, Architecture, types_of
from nemo_minitron.axes import family

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

__all__ = ["architecture_of", "configure_model", "windowed_architecture"]


def configure_model(
    config: Any,
    architecture: Architecture,
    tokenizer: Any = None,
    *,
    transformer_engine: bool,
    **options: Any,
) -> GPTModel:
    """A chunk of a model, as ``GPTConfig.configure_model`` builds it, with the layers of the family.

    Args:
        config: a NeMo configuration of the model. The types of the layers are noted on it; else it is left as it was.
        architecture: constants of the model.
        tokenizer, options: as of NeMo's method.
        transformer_engine: build Transformer Engine's layers.
    """
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.transformer.enums import AttnBackend
    from nemo.collections.llm.gpt.model.base import GPTConfig

    from nemo_minitron.runtime.layer_types import complete, note_layer_types, with_family_parts
    from nemo_minitron.runtime.rotary import interpolation_factor, scale_rotary

    qk_layernorm = family(architecture.family).qk_layernorm
    spec: Any = (
        get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm)
        if transformer_engine
        else get_gpt_layer_local_spec(qk_layernorm=qk_layernorm, normalization=config.normalization)
    )
    note_layer_types(config, architecture)
    changed = {
        "transformer_layer_spec": with_family_parts(spec, architecture, transformer_engine=transformer_engine),
        "rotary_base": architecture.rotary_base,  # NeMo's has both bases, which Megatron's class cannot take
        "seq_len_interpolation_factor": interpolation_factor(architecture),
    }
    if not transformer_engine:
        changed["attention_backend"] = AttnBackend.auto  # a choice among Transformer Engine's
    before = {name: getattr(config, name) for name in changed}
    vars(config).update(changed)
    try:
        chunk: GPTModel = GPTConfig.configure_model(config, tokenizer, **options)
    finally:
        vars(config).update(before)
    scale_rotary(chunk.rotary_pos_emb, architecture)
    complete(chunk, architecture)
    return chunk


def architecture_of(config: Any, name: str) -> Architecture:
    """The constants that a live model needs of a ``Gemma3Config``."""
    local, base = config.rotary_base
    factor = getattr(config, "rope_scaling_factor", 1.0)
    return Architecture(
        family=name,
        rotary_base=base,
        rotary_scaling=None if factor == 1.0 else {"rope_type": "linear", "factor": factor},
        layer_types=getattr(config, "layer_types", None)
        or types_of(sum(config.interleaved_attn_pattern), config.num_layers),
        sliding_window=config.window_size + 1,
        rotary_base_local=local,
    )


def windowed_architecture(config: Any, name: str) -> Architecture:
    """The constants that a live model needs of a configuration with the same window in every layer."""
    factor = config.seq_len_interpolation_factor
    return Architecture(
        family=name,
        rotary_base=config.rotary_base,
        rotary_scaling=None if factor is None else {"rope_type": "linear", "factor": factor},
        layer_types=(SLIDING,) * config.num_layers,
        sliding_window=config.window_size[0] + 1,
    )
