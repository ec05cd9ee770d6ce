"""Keys of a GGUF header that describe a model: sizes, constants, and where it comes from.

They are those that llama.cpp's ``convert_hf_to_gguf.py`` writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo_minitron import axes
from nemo_minitron.architecture import SLIDING, Architecture, period_of
from nemo_minitron.checkpoints.formats.entry import ExportNotes
from nemo_minitron.checkpoints.formats.gguf.architectures import written_as
from nemo_minitron.checkpoints.formats.gguf.kinds import Kind
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["add_model", "add_notes"]

#: The period of full attention that llama.cpp takes for Gemma 3 where a header says none.
_GEMMA3_PERIOD = 6
#: Settings of ``generation_config.json`` -> the key below ``general.sampling.``.
_SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
_YARN = ("beta_fast", "beta_slow")


def add_notes(writer: GGUFWriter, notes: ExportNotes, shape: ModelShape, architecture: Architecture) -> None:
    """Name, base, license and size label, and the settings of sampling that the model is released with."""
    from gguf import GGUFType
    from gguf.utility import size_label

    writer.add_type(GGUFType.MODEL)
    for key, value in architecture.generation.items():
        if key in _SAMPLING and isinstance(value, int | float) and not isinstance(value, bool):
            add = getattr(writer, f"add_sampling_{_SAMPLING[key]}", None)  # older releases of the package have none
            if add is not None:
                add(int(value) if key == "top_k" else float(value))
    writer.add_name(notes.name)
    table = axes.family(architecture.family)
    expert = sum(entry.count for entry in axes.parameters(table, shape) if entry.row.expert is not None)
    total, experts = axes.parameter_count(table, shape), shape.num_moe_experts or 0
    writer.add_size_label(size_label(total, total - expert, expert // max(experts, 1), experts))
    if notes.license is not None:
        writer.add_license(notes.license)
    if notes.license_name is not None:
        writer.add_license_name(notes.license_name)
    if notes.license_link is not None:
        writer.add_license_link(notes.license_link)
    if notes.base_name is not None:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, notes.base_name)
        if notes.base_hub_name is not None:
            organization, _, _ = notes.base_hub_name.rpartition("/")
            if organization:
                writer.add_base_model_organization(0, organization)
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{notes.base_hub_name}")


def add_model(writer: GGUFWriter, shape: ModelShape, architecture: Architecture, kind: Kind) -> None:
    """Sizes and constants.

    Args:
        writer: of a file of the family's architecture.
        shape, architecture: of a model that :func:`~nemo_minitron.checkpoints.formats.gguf.faults.gguf_faults` allows.
        kind: of the file.
    """
    from gguf import GGML_QUANT_VERSION

    name = written_as(architecture.family, shape)
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(architecture.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.ffn_hidden_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_query_groups)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_freq_base(float(architecture.rotary_base))
    writer.add_rope_dimension_count(int(shape.head_dim * architecture.rotary_percent))
    if axes.family(architecture.family).normalization == "LayerNorm":
        writer.add_layer_norm_eps(architecture.norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(architecture.norm_epsilon)
    if shape.num_moe_experts is not None and architecture.moe_router_topk is not None:
        writer.add_expert_count(shape.num_moe_experts)
        writer.add_expert_used_count(architecture.moe_router_topk)
        if name == "qwen3moe":
            writer.add_expert_feed_forward_length(shape.ffn_hidden_size)
    _add_scaling(writer, architecture)
    if axes.family(architecture.family).layer_types:
        _add_types(writer, architecture)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_file_type(kind.file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _add_scaling(writer: GGUFWriter, architecture: Architecture) -> None:
    """RoPE scaling; Llama 3's is a tensor."""
    from gguf import RopeScalingType

    scaling: dict[str, Any] = architecture.rotary_scaling or {}
    kind = architecture.rotary_type
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(scaling["original_max_position_embeddings"]))
        for key in _YARN:
            if key in scaling:
                getattr(writer, f"add_rope_scaling_yarn_{key}")(float(scaling[key]))


def _add_types(writer: GGUFWriter, architecture: Architecture) -> None:
    """Which layers slide."""
    types = architecture.layer_types or ()
    if SLIDING not in types:
        return
    assert architecture.sliding_window is not None
    writer.add_sliding_window(architecture.sliding_window)
    if architecture.rotary_base_local is not None:
        writer.add_rope_freq_base_swa(float(architecture.rotary_base_local))
    period = period_of(types)
    if period is None or period > len(types):
        writer.add_sliding_window_pattern([one == SLIDING for one in types])
    elif period != _GEMMA3_PERIOD:
        writer.add_sliding_window_pattern(period)
