"""HF ``config.json`` <-> (:class:`ModelShape`, :class:`Architecture`), for the Llama family.

Written models are always ``LlamaForCausalLM`` with an explicit ``head_dim``: without sliding windows a Mistral model
computes exactly what a Llama model does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_minitron.errors import CheckpointError, ShapeError
from nemo_minitron.shape import Architecture, ModelShape

__all__ = ["ARCHITECTURES", "from_hf", "read_json", "to_hf"]

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
ROPE_SCALING = ("default", "llama3")
DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"max_position_embeddings": 2048, "num_key_value_heads": None, "sliding_window": None},
    "MistralForCausalLM": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
}
"""What ``transformers.LlamaConfig`` and ``MistralConfig`` take for keys that a ``config.json`` leaves out."""
COMMON_DEFAULTS: dict[str, Any] = {
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object on disk.

    Raises:
        CheckpointError: if it is missing or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); restore the file") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__} where a JSON object is needed")
    return content


def from_hf(config: dict[str, Any], source: Path) -> tuple[ModelShape, Architecture]:
    """Sizes and constants out of a parsed ``config.json``.

    Keys that the file leaves out take the defaults of transformers' configuration classes.

    Raises:
        CheckpointError: for a foreign architecture or a feature that the family's table does not have; all of them
            are named in one message.
    """
    names = config.get("architectures") or [config.get("model_type", "unknown")]
    if not set(names) & set(ARCHITECTURES):
        raise CheckpointError(
            f"{source}: architecture {', '.join(map(str, names))} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    name = next(name for name in ARCHITECTURES if name in names)
    config = COMMON_DEFAULTS | DEFAULTS[name] | config
    positions, window, rope = config["max_position_embeddings"], config["sliding_window"], config["rope_scaling"]
    rope_type = (rope.get("rope_type") or rope.get("type") or "default") if rope else "default"
    found = [
        f"{key}={config[key]!r} is not supported: the Llama table has no bias"
        for key in ("attention_bias", "mlp_bias")
        if config.get(key)
    ]
    if config["hidden_act"] != "silu":
        found.append(f"hidden_act={config['hidden_act']!r} is not supported; only 'silu' is")
    if rope_type not in ROPE_SCALING:
        found.append(f"rope_scaling of type {rope_type!r} is not supported; supported: {', '.join(ROPE_SCALING)}")
    if window is not None and window < positions:
        found.append(
            f"sliding_window={window} is not supported; if no sequence will be longer than {window} tokens, set "
            f"sliding_window to null and max_position_embeddings to {window}"
        )
    if config.get("quantization_config"):
        found.append("quantized weights are not supported; dequantize the model first")
    if found:
        raise CheckpointError(f"{source}: " + "; ".join(found))
    try:
        heads = config["num_attention_heads"]
        shape = ModelShape(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=config["num_key_value_heads"] or heads,
            head_dim=config["head_dim"] or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            tied_embeddings=bool(config["tie_word_embeddings"]),
        )
    except KeyError as error:
        raise CheckpointError(f"{source} lacks {error}; it is not a complete Llama configuration") from None
    except (ShapeError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source}: {error}") from error
    architecture = Architecture(
        family="llama",
        norm_epsilon=config["rms_norm_eps"],
        rotary_base=float(config["rope_theta"]),
        rotary_scaling=None if rope_type == "default" else rope,
        max_position_embeddings=positions,
        bos_token_id=config["bos_token_id"],
        eos_token_id=config["eos_token_id"],
        pad_token_id=config["pad_token_id"],
    )
    return shape, architecture


def to_hf(shape: ModelShape, architecture: Architecture, *, dtype: str) -> dict[str, Any]:
    """The ``config.json`` of a ``LlamaForCausalLM`` with these sizes whose tensors are stored as ``dtype``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": architecture.bos_token_id,
        "eos_token_id": architecture.eos_token_id,
        "pad_token_id": architecture.pad_token_id,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.ffn_hidden_size,
        "max_position_embeddings": architecture.max_position_embeddings,
        "mlp_bias": False,
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_query_groups,
        "pretraining_tp": 1,
        "rms_norm_eps": architecture.norm_epsilon,
        "rope_scaling": architecture.rotary_scaling,
        "rope_theta": architecture.rotary_base,
        "tie_word_embeddings": shape.tied_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }
