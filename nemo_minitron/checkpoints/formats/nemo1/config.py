"""NeMo 1's ``model_config.yaml`` <-> (:class:`ModelShape`, :class:`Architecture`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron import axes
from nemo_minitron.accounting import Noted
from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.formats.nemo_known import NEMO1, NEMO1_NEUTRAL, unknown_settings
from nemo_minitron.checkpoints.tokenizer.files import special_ids, token_count
from nemo_minitron.errors import CheckpointError, ShapeError
from nemo_minitron.shape import ModelShape, uniform_faults

__all__ = ["from_nemo1", "nemo1_families", "nemo1_faults", "to_nemo1"]

TARGET = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"

REQUIRED: dict[str, Any] = {
    "mcore_gpt": True,
    "bias": False,
    "position_embedding_type": "rope",
    "rotary_interleaved": False,
    "apply_embedding_scaling": False,
    "num_moe_experts": None,
    "mcore_customization_config": None,
    "qk_layernorm": False,
    "window_size": None,
}
"""What every family here needs of a NeMo 1 GPT model. Keys that a file leaves out take :data:`DEFAULTS`."""

DEFAULTS: dict[str, Any] = {
    "mcore_gpt": False,
    "normalization": "layernorm",
    "bias": True,
    "qkv_bias": False,
    "position_embedding_type": "learned_absolute",
    "rotary_percentage": 1.0,
    "rotary_interleaved": False,
    "apply_embedding_scaling": False,
    "seq_len_interpolation_factor": None,
    "num_moe_experts": None,
    "mcore_customization_config": None,
    "qk_layernorm": False,
    "window_size": None,
    "activation": "gelu",
    "num_query_groups": None,
    "kv_channels": None,
    "share_embeddings_and_output_weights": True,
    "layernorm_epsilon": 1e-5,
    "rotary_base": 10000,
    "scale_positional_embedding": False,
    "scale_factor": 8,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "old_context_len": 8192,
    "override_vocab_size": None,
}
"""What NeMo's ``MegatronGPTModel`` takes for keys that are not there."""

SAME = {"swiglu": "fast-swiglu"}
"""Other names of an activation."""


def nemo1_families() -> dict[str, Mapping[str, Any]]:
    """By name, the families that NeMo 1 can hold, with what each needs beside :data:`REQUIRED`."""
    return {name: table.nemo1 for name, table in axes.FAMILIES.items() if table.nemo1 is not None}


def from_nemo1(
    content: dict[str, Any], source: Path, rows: int, tokenizer: Path | None
) -> tuple[ModelShape, Architecture]:
    """Sizes and constants out of a ``model_config.yaml`` that NeMo wrote.

    Args:
        content: the parsed file.
        source: names it in messages.
        rows: stored vocabulary rows.
        tokenizer: directory of the tokenizer that the archive carries; it tells the true vocabulary.

    Raises:
        CheckpointError: for a foreign architecture, all reasons in one message, or an incomplete configuration.
    """
    config = Noted(content, DEFAULTS)
    faults = [
        f"{key}={config[key]!r} is not supported (needed: {value!r})"
        for key, value in REQUIRED.items()
        if config[key] != value
    ]
    if (name := config["activation"]) in SAME:
        config = Noted({**content, "activation": SAME[name]}, DEFAULTS)
    unlike = {
        family: [
            f"{key}={config[key]!r} is not supported (needed: {value!r})"
            for key, value in needs.items()
            if config[key] != value
        ]
        for family, needs in nemo1_families().items()
    }
    family = min(unlike, key=lambda name: len(unlike[name]))
    faults += unlike[family]
    interpolated, scaled = config["seq_len_interpolation_factor"], config["scale_positional_embedding"]
    if not axes.family(family).scales_rotary and (interpolated is not None or scaled):
        faults.append(
            f"seq_len_interpolation_factor={interpolated!r}, scale_positional_embedding={scaled!r}: RoPE of the family "
            "is not scaled"
        )
    elif interpolated is not None and scaled:
        faults.append(
            f"seq_len_interpolation_factor={interpolated!r} with scale_positional_embedding={scaled!r}: one scaling of "
            "RoPE alone is supported"
        )
    if faults:
        target = str(config.get("target", "unknown")).rsplit(".", 1)[-1]
        raise CheckpointError(f"{source}: {target} is not a {family} model: " + "; ".join(faults))
    special = special_ids(tokenizer) if tokenizer is not None else {}
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        vocab = config["override_vocab_size"]
        if vocab is None:
            vocab = token_count(tokenizer) if tokenizer is not None else rows
        shape = ModelShape(
            num_layers=config["num_layers"],
            hidden_size=hidden,
            ffn_hidden_size=config["ffn_hidden_size"],
            num_attention_heads=heads,
            num_query_groups=config["num_query_groups"] or heads,
            head_dim=config["kv_channels"] or hidden // heads,
            vocab_size=vocab,
            tied_embeddings=config["share_embeddings_and_output_weights"],
        )
        architecture = Architecture(
            family=family,
            norm_epsilon=float(config["layernorm_epsilon"]),
            rotary_base=float(config["rotary_base"]),
            rotary_percent=float(config["rotary_percentage"]),
            rotary_scaling=_rotary_scaling(config),
            max_position_embeddings=config["encoder_seq_length"],
            bos_token_id=special.get("bos_token_id"),
            eos_token_id=special.get("eos_token_id"),
            pad_token_id=special.get("pad_token_id"),
        )
    except KeyError as error:
        raise CheckpointError(f"{source} lacks {error}; it is not a complete GPT configuration") from None
    except (ShapeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source}: {error}") from error
    used = (*REQUIRED, *nemo1_families()[family])
    left = {key: value for key, value in config.left().items() if key not in used}
    if faults := unknown_settings(left, source, harmless=NEMO1, neutral=NEMO1_NEUTRAL):
        raise CheckpointError(f"{source}: " + "; ".join(faults))
    return shape, architecture


def _rotary_scaling(config: Mapping[str, Any]) -> dict[str, Any] | None:
    if (factor := config["seq_len_interpolation_factor"]) is not None:
        return {"rope_type": "linear", "factor": float(factor)}
    if not config["scale_positional_embedding"]:
        return None
    return {
        "rope_type": "llama3",
        "factor": float(config["scale_factor"]),
        "low_freq_factor": float(config["low_freq_factor"]),
        "high_freq_factor": float(config["high_freq_factor"]),
        "original_max_position_embeddings": config["old_context_len"],
    }


def nemo1_faults(shape: ModelShape, architecture: Architecture) -> list[str]:
    """Why the format cannot hold a model; empty if it can."""
    faults, known = uniform_faults(shape, "format=nemo"), nemo1_families()
    if architecture.family not in known:
        faults.append(
            f"a .nemo cannot hold a {architecture.family} model (NeMo 1 holds {', '.join(known)}); write the nemo2 "
            "or the hf format"
        )
    if architecture.windowed:
        faults.append(
            f"a .nemo cannot hold sliding windows ({architecture.sliding_window} tokens): NeMo 1 has none; write the "
            "nemo2 or the hf format"
        )
    if (kind := architecture.rotary_type) not in ("default", "linear", "llama3"):
        faults.append(f"a .nemo cannot hold RoPE scaling of type {kind!r}: NeMo 1 has none; write the hf format")
    return faults


def to_nemo1(shape: ModelShape, architecture: Architecture, *, dtype: str, multiple: int, rows: int | None) -> str:
    """The ``model_config.yaml`` of a ``MegatronGPTModel`` with these sizes.

    It restores on a CPU without Transformer Engine: fusions are off, ``megatron_amp_O2`` is false, and the optimizer is
    ``mcore_distributed_optim`` (plain ``adamw`` cannot save its ``step``, which has shape ``()``).

    Args:
        shape, architecture: the model's.
        dtype: of the tensors; float32 gives ``precision: 32``, the others their mixed precision.
        multiple: what the vocabulary is padded to (times TP).
        rows: fixed vocabulary rows, or None where the tokenizer gives the vocabulary.

    Raises:
        CheckpointError: for a model that NeMo 1 cannot hold.
    """
    import yaml

    from nemo_minitron.runtime.rotary import interpolation_factor

    if faults := nemo1_faults(shape, architecture):
        raise CheckpointError("; ".join(faults))
    base, needs = architecture.rotary_base, nemo1_families()[architecture.family]
    config: dict[str, Any] = {
        "target": TARGET,
        "mcore_gpt": True,
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "rampup_batch_size": None,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "context_parallel_size": 1,
        "sequence_parallel": False,
        "encoder_seq_length": architecture.max_position_embeddings,
        "max_position_embeddings": architecture.max_position_embeddings,
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.head_dim,
        "make_vocab_size_divisible_by": multiple,
        "pre_process": True,
        "post_process": True,
        "share_embeddings_and_output_weights": shape.tied_embeddings,
        "layernorm_epsilon": architecture.norm_epsilon,
        "persist_layer_norm": False,
        "position_embedding_type": "rope",
        "rotary_percentage": architecture.rotary_percent,
        "rotary_interleaved": False,
        "seq_len_interpolation_factor": interpolation_factor(architecture),
        "rotary_base": int(base) if float(base).is_integer() else base,
        "bias": False,
        **needs,
        "transformer_block_type": "pre_ln",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
        "init_method_std": 0.02,
        "use_scaled_init_method": True,
        "apply_query_key_layer_scaling": False,
        "normalize_attention_scores": True,
        "attention_type": "multihead",
        "megatron_amp_O2": False,
        "precision": {"float32": 32, "bfloat16": "bf16-mixed", "float16": "16-mixed"}.get(dtype, 32),
        "native_amp_init_scale": 4294967296,
        "native_amp_growth_interval": 1000,
        "hysteresis": 2,
        "fp32_residual_connection": False,
        "fp16_lm_cross_entropy": False,
        "grad_allreduce_chunk_size_mb": 125,
        "grad_div_ar_fusion": False,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_add_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "cross_entropy_loss_fusion": False,
        "transformer_engine": False,
        "fp8": False,
        "use_cpu_initialization": True,
        "gradient_as_bucket_view": True,
        "sync_batch_comm": False,
        "activations_checkpoint_granularity": None,
        "activations_checkpoint_method": None,
        "activations_checkpoint_num_layers": None,
        "seed": 1234,
        "dist_ckpt_format": "torch_dist",
        "dist_ckpt_load_on_device": True,
        "dist_ckpt_parallel_save": True,
        "tokenizer": {
            "library": "huggingface",
            "type": "nemo_tokenizer",
            "model": None,
            "vocab_file": None,
            "merge_file": None,
            "use_fast": True,
            "sentencepiece_legacy": False,
        },
        "data": {"data_prefix": [], "splits_string": "98,1,1", "seq_length": architecture.max_position_embeddings},
        "optim": {
            "name": "mcore_distributed_optim",
            "lr": 1e-4,
            "weight_decay": 0.01,
            "betas": [0.9, 0.95],
            "overlap_grad_sync": False,
            "overlap_param_sync": False,
            "sched": {"name": "CosineAnnealing", "warmup_steps": 0, "constant_steps": 0, "min_lr": 1e-5},
        },
    }
    if rows is not None:
        config["override_vocab_size"] = rows
    if (scaling := architecture.rotary_scaling) is not None and architecture.rotary_type == "llama3":
        config |= {
            "scale_positional_embedding": True,
            "scale_factor": scaling["factor"],
            "low_freq_factor": scaling["low_freq_factor"],
            "high_freq_factor": scaling["high_freq_factor"],
            "old_context_len": scaling["original_max_position_embeddings"],
        }
    return yaml.safe_dump(config, sort_keys=False)
