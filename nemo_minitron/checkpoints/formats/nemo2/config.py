"""NeMo 2's model configurations <-> (:class:`ModelShape`, :class:`Architecture`).

What a family needs of a configuration follows from its axes table; NeMo's class names are in
:mod:`nemo_minitron.families`. The values written are those that NeMo's own importers from Hugging Face set
(``nemo.collections.llm.gpt.model``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from nemo_minitron import axes
from nemo_minitron.accounting import Noted
from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.formats.nemo2.layer_types import (
    list_faults,
    read_scaling,
    read_types,
    read_window,
    rotary_faults,
    window_faults,
    written_types,
    written_window,
)
from nemo_minitron.checkpoints.formats.nemo_common import padded
from nemo_minitron.checkpoints.formats.nemo_known import LAYER_SPECS, NEMO2, NEMO2_NEUTRAL, unknown_settings
from nemo_minitron.checkpoints.tokenizer.files import special_ids, token_count
from nemo_minitron.checkpoints.weights import torch_dtype
from nemo_minitron.errors import CheckpointError, ShapeError
from nemo_minitron.families.entry import NeMo2Family
from nemo_minitron.shape import ModelShape, uniform_faults

__all__ = ["config_class", "from_nemo2", "model_class", "nemo2_faults", "nemo_config", "own_class_faults"]


SCALED_MODULE = "nemo_minitron.checkpoints.formats.nemo2.scaled"
OWN_CLASS = "Scaled"
"""Begins the names of the classes there; then comes the name of the class of NeMo's that is extended."""

LISTED_MODULE, LISTED_CLASS = "nemo_minitron.checkpoints.formats.nemo2.listed", "Listed"
"""The same of layers whose types follow no pattern."""

ACTIVATIONS = {"silu": "silu", "gelu_tanh": "openai_gelu", "squared_relu": "squared_relu"}
"""Name in the axes table -> end of the function's name in a ``model.yaml``."""

PLAIN_ROUTING: dict[str, Any] = {
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": None,
    "moe_router_topk_scaling_factor": None,
    "moe_expert_capacity_factor": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_apply_probs_on_input": False,
    "moe_layer_freq": 1,
}
"""A router of a softmax, with nothing added, in every layer."""

NO_FUSIONS = dict.fromkeys(
    (
        "apply_rope_fusion",
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "cross_entropy_loss_fusion",
        "gradient_accumulation_fusion",
        "masked_softmax_fusion",
        "persist_layer_norm",
    ),
    False,
)
"""Written contexts must load where there is neither CUDA nor Transformer Engine; a recipe on GPUs turns them on."""


def required(table: axes.Family) -> dict[str, Any]:
    """Settings that a NeMo configuration of this family may not contradict; it may leave them out."""
    needs = {
        "normalization": table.normalization,
        "gated_linear_unit": table.gated,
        "add_bias_linear": False,
        "add_qkv_bias": table.qkv_bias,
        "position_embedding_type": "rope",
        "rotary_interleaved": False,
        "qk_layernorm": table.qk_layernorm,
        "layernorm_zero_centered_gamma": table.zero_centered_norm,
        "multi_latent_attention": False,
    }
    if not table.partial_rotary:
        needs["rotary_percent"] = 1.0
    if table.layer_types:
        del needs["qk_layernorm"]  # NeMo's layers of these families have the norms whatever it says
    if table.layer_types or not table.scales_rotary:
        needs["seq_len_interpolation_factor"] = None
    if table.normalizes_topk:
        needs["moe_router_pre_softmax"] = False
    return needs | (PLAIN_ROUTING if table.expert else {"num_moe_experts": None})


def model_class(architecture: Architecture) -> Any:
    """NeMo's class of models with these constants, a ``nemo.collections.llm.GPTModel``.

    Raises:
        CheckpointError: if NeMo does not know the family, or has none of its models with sliding windows.
    """
    known = _form(architecture)
    return getattr(import_module(f"nemo.collections.llm.gpt.model.{known.module}"), known.model)


def config_class(architecture: Architecture) -> Any:
    """The class of a model's configuration: NeMo's, or one of :mod:`scaled` where NeMo's cannot scale RoPE as it is.

    Raises:
        CheckpointError: if NeMo does not know the family, or neither has a class.
    """
    known = _form(architecture)
    name, module = known.config, import_module(f"nemo.collections.llm.gpt.model.{known.module}")
    if list_faults(architecture):
        return getattr(import_module(LISTED_MODULE), LISTED_CLASS + name)
    if own_class_faults(architecture):
        name, module = OWN_CLASS + name, import_module(SCALED_MODULE)
        if not hasattr(module, name):
            raise CheckpointError(
                f"there is no NeMo configuration with RoPE scaling of type {architecture.rotary_type!r} for the family "
                f"{architecture.family!r}; write the hf format"
            )
    elif architecture.rotary_type == "llama3":
        assert known.scaled is not None
        name = known.scaled
    return getattr(module, name)


def own_class_faults(architecture: Architecture) -> list[str]:
    """Why NeMo alone, without this package, cannot open a model: none of its classes can describe it. Or empty."""
    if unlisted := list_faults(architecture):
        return unlisted
    if architecture.windowed:  # of NeMo's own classes, or of none
        return []
    kind, known = architecture.rotary_type, _nemo2_families().get(architecture.family)
    if known is None or kind in ("default", "linear") or (kind == "llama3" and known.scaled is not None):
        return []
    return [
        f"NeMo has no class of {architecture.family} models with RoPE scaling of type {kind!r}, so others could not "
        "open the export; export the hf format, or set rope_scaling to null where no sequence is longer than its "
        "original_max_position_embeddings"
    ]


def nemo2_faults(shape: ModelShape, architecture: Architecture) -> list[str]:
    """Why the format cannot hold a model; empty if it can."""
    faults = uniform_faults(shape, "format=nemo2")
    faults += rotary_faults(architecture)
    known = _nemo2_families().get(architecture.family)
    if known is None:
        return [*faults, _no_form(architecture.family)]
    return faults + window_faults(architecture, offered=known.windowed is not None)


def nemo_config(shape: ModelShape, architecture: Architecture, *, dtype: str, multiple: int, rows: int | None) -> Any:
    """NeMo's configuration of a model: ``LlamaConfig``, ``Qwen2Config``, ..., or see :func:`config_class`.

    Args:
        shape, architecture: the model's.
        dtype: of the parameters.
        multiple: what NeMo pads the tokenizer's vocabulary to (times TP).
        rows: fixed number of vocabulary rows; None lets NeMo derive it from the tokenizer for any TP.

    Raises:
        CheckpointError: as :func:`config_class`.
    """
    from nemo_minitron.runtime import rotary

    known, table, base = _form(architecture), axes.family(architecture.family), architecture.rotary_base
    values: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.head_dim,
        "share_embeddings_and_output_weights": shape.tied_embeddings,
        "layernorm_epsilon": architecture.norm_epsilon,
        "rotary_base": int(base) if float(base).is_integer() else base,
        "rotary_percent": architecture.rotary_percent,
        "seq_length": architecture.max_position_embeddings,
        "make_vocab_size_divisible_by": multiple,
        "vocab_size": rows,
        "fp16": dtype == "float16",
        "bf16": dtype == "bfloat16",
        "params_dtype": torch_dtype(dtype),
        "use_cpu_initialization": True,
        "seq_len_interpolation_factor": rotary.interpolation_factor(architecture),
        **rotary.attention_settings(architecture, shape.head_dim),
        **NO_FUSIONS,
    }
    if known.config == "GPTConfig":
        from nemo_minitron.runtime.model import ACTIVATIONS as FUNCTIONS

        # NeMo's classes of families switch dropout off, this base of theirs does not
        values |= {"hidden_dropout": 0.0, "attention_dropout": 0.0}
        values |= {**required(table), "activation_func": FUNCTIONS[table.activation], **values}
    if table.expert:
        values |= {
            "num_moe_experts": shape.num_moe_experts,
            "moe_router_topk": architecture.moe_router_topk,
            "moe_ffn_hidden_size": shape.ffn_hidden_size,
            "moe_router_pre_softmax": architecture.moe_router_pre_softmax,
            "moe_aux_loss_coeff": architecture.moe_aux_loss_coeff,
            # experts computed one by one, which needs no library of CUDA's, and can be scored and pruned
            "moe_grouped_gemm": False,
            "moe_permute_fusion": False,
        }
    if table.layer_types:
        values |= written_types(architecture, rows or padded(shape.vocab_size, multiple))
    values |= written_window(architecture)
    config = config_class(architecture)
    scaling = architecture.rotary_scaling
    if config.__name__.startswith(OWN_CLASS):
        values["rotary_scaling"] = scaling
    elif scaling is not None and architecture.rotary_type == "llama3":
        values |= {
            "scale_factor": scaling["factor"],
            "low_freq_factor": scaling["low_freq_factor"],
            "high_freq_factor": scaling["high_freq_factor"],
            "old_context_len": scaling["original_max_position_embeddings"],
        }
    if any(field.name == "max_position_embeddings" for field in dataclasses.fields(config)):
        values["max_position_embeddings"] = architecture.max_position_embeddings
    return config(**values)


def from_nemo2(
    content: dict[str, Any], source: Path, rows: int, tokenizer: Path | None
) -> tuple[ModelShape, Architecture]:
    """Sizes and constants out of a ``model.yaml`` that NeMo wrote.

    Args:
        content: the parsed file.
        source: names it in messages.
        rows: stored vocabulary rows.
        tokenizer: directory of the tokenizer in the context; it tells the true vocabulary.

    Raises:
        CheckpointError: for a foreign architecture, all reasons in one message, or an incomplete configuration.
    """
    given = content.get("config")
    if not isinstance(given, dict):
        raise CheckpointError(f"{source} has no model configuration; it is not a NeMo 2 language model's")
    config: Mapping[str, Any] = given
    module, _, name = str(config.get("_target_", "unknown")).rpartition(".")
    if module in (SCALED_MODULE, LISTED_MODULE):
        name = name.removeprefix(OWN_CLASS).removeprefix(LISTED_CLASS)
    known = _nemo2_families()
    faults = {key: _unlike(config, axes.family(key)) for key, form in known.items() if name.startswith(form.reads)}
    if not faults:
        supported = dict.fromkeys(start for form in known.values() for start in form.reads)
        raise CheckpointError(
            f"{source}: architecture {name} is not supported; supported: {', '.join(supported)} and their sizes"
        )
    # a window says nothing of which family it is
    family = min(faults, key=lambda key: sum(not fault.startswith("window_size=") for fault in faults[key]))
    if faults[family]:
        raise CheckpointError(f"{source}: {name} is no {family} model: " + "; ".join(faults[family]))
    special = special_ids(tokenizer) if tokenizer is not None else {}
    config = noted = Noted(given)
    _unlike(config, axes.family(family))  # notes what it asks for
    typed = axes.family(family).layer_types
    try:
        heads, hidden, experts = config["num_attention_heads"], config["hidden_size"], bool(axes.family(family).expert)
        vocab = config.get("vocab_size")
        if vocab is None:
            vocab = token_count(tokenizer) if tokenizer is not None else rows
        ffn = config["ffn_hidden_size"]
        if experts and config["moe_ffn_hidden_size"] is not None:
            ffn = config["moe_ffn_hidden_size"]
        shape = ModelShape(
            num_layers=config["num_layers"],
            hidden_size=hidden,
            ffn_hidden_size=ffn,
            num_attention_heads=heads,
            num_query_groups=config["num_query_groups"] or heads,
            head_dim=config["kv_channels"] or hidden // heads,
            vocab_size=vocab,
            tied_embeddings=config["share_embeddings_and_output_weights"],
            num_moe_experts=config["num_moe_experts"] if experts else None,
        )
        architecture = Architecture(
            family=family,
            norm_epsilon=config["layernorm_epsilon"],
            rotary_base=float(config["rotary_base"][1] if typed else config["rotary_base"]),
            rotary_percent=float(config.get("rotary_percent", known[family].rotary_percent)),
            rotary_scaling=read_scaling(config) if typed else _rotary_scaling(config),
            # the classes of some families have both, and their importers set only one
            max_position_embeddings=config.get("max_position_embeddings") or config["seq_length"],
            bos_token_id=special.get("bos_token_id"),
            eos_token_id=special.get("eos_token_id"),
            pad_token_id=special.get("pad_token_id"),
            moe_router_topk=config["moe_router_topk"] if experts else None,
            moe_aux_loss_coeff=config["moe_aux_loss_coeff"] if experts else 0.0,
            moe_router_pre_softmax=experts and bool(config.get("moe_router_pre_softmax")),
            **(read_types(config, shape) if typed else read_window(config)),
        )
        if invalid := architecture.faults(shape):
            raise CheckpointError(f"{source}: {invalid[0]}")
    except KeyError as error:
        raise CheckpointError(f"{source} lacks {error}; it is not a complete {family} configuration") from None
    except (ShapeError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source}: {error}") from error
    if unknown := _unknown(content, noted, source, experts=experts):
        raise CheckpointError(f"{source}: " + "; ".join(unknown))
    return shape, architecture


def _unknown(content: Mapping[str, Any], config: Noted, source: Path, *, experts: bool) -> list[str]:
    """Refusals of what nobody asked for, in the configuration and beside it."""
    faults = []
    if content.get("model_transform") is not None:
        faults.append(
            f"model_transform={content['model_transform']!r} changes the model, as adapters do; merge it into the "
            "weights first (nemo.collections.llm.peft.merge_lora)"
        )
    spec = config.get("transformer_layer_spec")
    spec = spec.get("_target_") if isinstance(spec, dict) else spec
    if spec is not None and not str(spec).startswith(LAYER_SPECS):
        faults.append(f"transformer_layer_spec={spec}: layers of another package may compute something else")
    return faults + unknown_settings(config.left(), source, harmless=NEMO2, neutral=NEMO2_NEUTRAL, experts=experts)


def _nemo2_families() -> dict[str, NeMo2Family]:
    """The families that NeMo 2 has, by name."""
    return {name: table.nemo2 for name, table in axes.FAMILIES.items() if table.nemo2 is not None}


def _known(name: str) -> NeMo2Family:
    known = _nemo2_families()
    if name not in known:
        raise CheckpointError(_no_form(name))
    return known[name]


def _form(architecture: Architecture) -> NeMo2Family:
    """NeMo's classes of models with these constants."""
    known = _known(architecture.family)
    faults = window_faults(architecture, offered=known.windowed is not None)
    if architecture.windowed:
        faults += rotary_faults(architecture)
    if faults:
        raise CheckpointError("; ".join(faults))
    return known.windowed if architecture.windowed and known.windowed is not None else known


def _no_form(name: str) -> str:
    return (
        f"family {name!r} has no NeMo 2 form; write another format, or add the form to "
        f"nemo_minitron/families/{name}.py (there: {', '.join(_nemo2_families())})"
    )


def _unlike(config: Mapping[str, Any], table: axes.Family) -> list[str]:
    """All settings of a configuration that the family's table does not support."""
    faults = [
        f"{key}={config[key]!r} is not supported (needed: {value!r})"
        for key, value in required(table).items()
        if key in config and config[key] != value
    ]
    if table.expert and config.get("num_moe_experts") is None:
        faults.append("num_moe_experts=None is not supported: the family is a mixture of experts")
    activation, needed = config.get("activation_func"), ACTIVATIONS[table.activation]
    activation = activation.get("_target_") if isinstance(activation, dict) else activation
    if activation is not None and not str(activation).endswith(needed):
        faults.append(f"activation_func={activation} is not supported (needed: {needed})")
    if table.layer_types:
        return faults
    scaling, scale = config.get("rotary_scaling"), config.get("softmax_scale")
    if scale is not None and (scaling or {}).get("rope_type") != "yarn":
        faults.append(f"softmax_scale={scale} is not supported: the attention of the family has the scale of its heads")
    window = config.get("window_size")
    offered = table.nemo2 is not None and table.nemo2.windowed is not None
    if window is not None and window[0] + 1 < config["seq_length"] and not offered:
        faults.append(f"window_size={window} is not supported: the family has no sliding-window attention")
    return faults


def _rotary_scaling(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """HF's ``rope_scaling`` for a ``Llama31Config``, a linear interpolation, or a class of ours.

    The first's classes are the only ones of NeMo's with a ``scale_factor``.
    """
    scaling: dict[str, Any] | None = config.get("rotary_scaling")
    if scaling is None and "scale_factor" in config:
        scaling = {
            "rope_type": "llama3",
            "factor": config["scale_factor"],
            "low_freq_factor": config["low_freq_factor"],
            "high_freq_factor": config["high_freq_factor"],
            "original_max_position_embeddings": config["old_context_len"],
        }
    if (factor := config.get("seq_len_interpolation_factor")) is None:
        return scaling
    if scaling is not None:
        raise ShapeError(f"seq_len_interpolation_factor={factor} beside another scaling of RoPE is not supported")
    return {"rope_type": "linear", "factor": float(factor)}
