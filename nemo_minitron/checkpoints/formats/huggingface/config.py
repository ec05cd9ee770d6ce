"""HF ``config.json`` <-> (:class:`ModelShape`, :class:`Architecture`)."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from nemo_minitron import axes
from nemo_minitron.accounting import Noted, refusable, warn_once
from nemo_minitron.architecture import FULL, SLIDING, Architecture
from nemo_minitron.checkpoints.formats.huggingface import known
from nemo_minitron.checkpoints.formats.huggingface.blocks import read_blocks, write_blocks
from nemo_minitron.checkpoints.formats.huggingface.families import hf_families, hf_family
from nemo_minitron.checkpoints.formats.huggingface.layer_types import (
    older_spelling_by_type,
    read_layer_types,
    type_spellings,
)
from nemo_minitron.checkpoints.formats.huggingface.rotary import (
    older_spelling,
    read_scaling,
    scaling_faults,
    spellings,
)
from nemo_minitron.errors import CheckpointError, ShapeError
from nemo_minitron.families.entry import HFFamily
from nemo_minitron.parsing import parse_json
from nemo_minitron.shape import ModelShape

__all__ = ["from_hf", "hf_faults", "read_json", "to_hf"]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object on disk.

    Raises:
        CheckpointError: if it is missing or not a JSON object.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); restore the file") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__} where a JSON object is needed")
    return content


def from_hf(config: dict[str, Any], source: Path) -> tuple[ModelShape, Architecture]:
    """Sizes and constants out of a parsed ``config.json``.

    Keys that the file leaves out take the defaults of transformers' configuration classes. A key that is neither used
    nor known as harmless is refused where it is switched on, and named in a warning where it is not.

    Raises:
        CheckpointError: for a foreign architecture, a feature that the family's table does not have, or a key that is
            not known; all of them are named in one message.
    """
    readers = {name: (key, family) for key, family in hf_families().items() for name in family.reads}
    kind = config.get("model_type", "unknown")
    # without a class transformers' AutoModelForCausalLM goes by the type alone
    by_type = next((name for name, (_, family) in readers.items() if _model_type(name, family) == kind), kind)
    names = config.get("architectures") or [by_type]
    names = names if isinstance(names, list) else [names]
    name = next((name for name in readers if name in names), None)
    shown, subclass = ", ".join(map(str, names)), name is None and by_type in readers and _derived(names, by_type)
    if subclass:
        name = by_type
    if name is None:
        remedy = (
            f"; if it is a plain {by_type}, as model_type={kind!r} says, write that into architectures"
            if by_type in readers
            else ""
        )
        raise CheckpointError(
            f"{source}: architecture {shown} is not supported; supported: {', '.join(readers)}{remedy}"
        )
    key, family = readers[name]
    spelled = older_spelling_by_type if axes.family(key).layer_types else older_spelling
    older, faults = spelled(config)
    for other, known_key in family.other_names.items():
        value = older.pop(other, None)
        if value is not None and older.setdefault(known_key, value) != value:
            faults.append(f"{other}={value!r} and {known_key}={older[known_key]!r} differ; remove the wrong one")
    given = Noted(older, family.reads[name])
    try:
        faults += _unsupported(given, axes.family(key), family, name)
        described = _describe(given, source, key, name)
        faults += _unknown(given, described, source, name, family)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{source}: " + "; ".join([*faults, f"a value is of the wrong kind ({error})"])
        ) from error
    except CheckpointError as error:
        if not faults:
            raise
        raise CheckpointError(f"{source}: " + "; ".join(faults)) from error
    if faults:
        raise CheckpointError(f"{source}: " + "; ".join(faults))
    if subclass:
        warn_once(source, f"architecture {shown} is read as {name}: transformers, too, goes by model_type={kind!r}")
    return described


def _derived(names: list[Any], known: str) -> bool:
    """Whether classes are named after a known one, as subclasses are: ``MyLlamaForCausalLM``, ``LLaMAForCausalLM``."""
    return all(known.casefold() in str(name).casefold() for name in names)


def _describe(config: Noted, source: Path, key: str, name: str) -> tuple[ModelShape, Architecture]:
    """Sizes and constants of a model of the family ``key`` and transformers' class ``name``."""
    family = hf_family(key)
    try:
        heads, width = config["num_attention_heads"], config[family.width]
        groups, layers = config["num_key_value_heads"] or heads, None
        if family.by_layer is not None and name == family.by_layer[0]:
            layers = read_blocks(config)
            # stand for no layer: each block has its own
            width, groups = 1, heads
        shape = ModelShape(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=width,
            num_attention_heads=heads,
            num_query_groups=groups,
            head_dim=config["head_dim"] or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            tied_embeddings=bool(config["tie_word_embeddings"]),
            num_moe_experts=config[family.experts] if family.expert else None,
            layers=layers,
        )
    except KeyError as error:
        raise CheckpointError(
            f"{source} lacks {error}; it is not a complete {family.model_type} configuration"
        ) from None
    except (CheckpointError, ShapeError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source}: {error}") from error
    scaling, positions = read_scaling(config["rope_scaling"], config["max_position_embeddings"], source)
    architecture = Architecture(
        family=key,
        norm_epsilon=config[family.epsilon],
        rotary_base=float(config["rope_theta"]),
        rotary_percent=float(config["partial_rotary_factor"]),
        rotary_scaling=scaling,
        max_position_embeddings=positions,
        bos_token_id=config["bos_token_id"],
        eos_token_id=config["eos_token_id"],
        pad_token_id=config["pad_token_id"],
        moe_router_topk=config["num_experts_per_tok"] if family.expert else None,
        moe_aux_loss_coeff=config["router_aux_loss_coef"] if family.expert else 0.0,
        moe_router_pre_softmax=family.normalized is not None and not config[family.normalized],
        **(_layer_types(config, shape) if axes.family(key).layer_types else _windows(config, shape, positions)),
    )
    if faults := architecture.faults(shape):
        raise CheckpointError(f"{source}: {faults[0]}")
    return shape, architecture


def _layer_types(config: Noted, shape: ModelShape) -> dict[str, Any]:
    """The constants of a family whose layers are of two types."""
    window = config["sliding_window"]
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ValueError(f"sliding_window={window!r}")
    return {
        "layer_types": read_layer_types(config, shape.num_layers)[0],
        "sliding_window": window,
        "rotary_base_local": float(config["rope_local_base_freq"]),
        "query_pre_attn_scalar": float(config["query_pre_attn_scalar"]),
    }


def _windows(config: Noted, shape: ModelShape, positions: int) -> dict[str, Any]:
    """The constants of a model whose layers all have the same window; empty where it hides nothing."""
    if (window := _window(config, positions)) is None:
        return {}
    return {"layer_types": (SLIDING,) * shape.num_layers, "sliding_window": window}


def _window(config: Noted, positions: int) -> int | None:
    """The window of a model without types of layers, if it is shorter than the longest sequence."""
    window = config["sliding_window"]
    if not config["use_sliding_window"] or window is None or window >= positions:
        return None
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ValueError(f"sliding_window={window!r}")
    return window


def _unknown(
    config: Noted, described: tuple[ModelShape, Architecture], source: Path, name: str, family: HFFamily
) -> list[str]:
    """Refusals of keys that nobody asked for; warns of those that are switched off."""
    own_code = family.by_layer is not None and name == family.by_layer[0]
    faults = []
    kind = _model_type(name, family)
    if config.get("model_type") not in (None, kind):
        faults.append(
            f"model_type={config['model_type']!r} is not that of {name}, {kind!r}, and transformers goes by it; "
            f"make architectures and model_type agree"
        )
    shape, architecture = described
    for key, value in (
        ("kv_channels", shape.head_dim),
        ("rotary_percent", architecture.rotary_percent),
        ("rope_percent", architecture.rotary_percent),
    ):
        if config.get(key) not in (None, value):
            faults.append(f"{key}={config[key]!r} contradicts the {value} that the other keys say; correct one of them")
    code = config.get("auto_map") or {}
    if not own_code and any(str(each).startswith("AutoModel") for each in code):
        faults.append(
            f"auto_map={code!r}: the model has code of its own, which may compute something else; "
            f"if it is a plain {name}, remove auto_map"
        )
    config.get("architectures")
    harmless = {**known.KEYS, **family.unused}
    active = refusable(config.left(), source=source, harmless=harmless, neutral=known.NEUTRAL_KEYS)
    return faults + [
        f"{key}={_short(value)} is not known, and may change what the model computes; if it does not, remove the key"
        for key, value in active.items()
    ]


def _model_type(name: str, family: HFFamily) -> str:
    """The ``model_type`` of a transformers class that a family reads."""
    if family.by_layer is not None and name == family.by_layer[0]:
        return family.by_layer[1]
    return family.model_type if name == family.architecture else name.removesuffix("ForCausalLM").lower()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _unsupported(config: Noted, table: axes.Family, family: HFFamily, name: str) -> list[str]:
    """Everything in a configuration of transformers' class ``name`` that the family's table does not stand for."""
    rope, positions = config["rope_scaling"], config["max_position_embeddings"]
    partial = config["partial_rotary_factor"]
    faults = [
        f"{key}={config[key]!r} is not supported; a {family.model_type} model needs {value!r}"
        for key, value in family.needs.items()
        if config[key] != value and not (config[key] is None and value == [])
    ]
    if scaled := scaling_faults(rope, positions=positions, partial=partial):
        faults += scaled
    else:
        _, positions = read_scaling(rope, positions)
    if partial != 1 and not table.partial_rotary:
        faults.append(f"partial_rotary_factor={partial!r} is not supported in this family")
    if table.layer_types:
        faults += read_layer_types(config, config["num_hidden_layers"])[1]
        return faults + _quantized(config)
    window = _window(config, positions)
    windowed = family.windowed is not None and family.windowed[0] == name
    if window is not None and not windowed:
        faults.append(
            f"sliding_window={window} is not supported; if no sequence will be longer than {window} tokens, set "
            f"sliding_window to null and max_position_embeddings to {window}"
        )
    slides = config["use_sliding_window"] and config["sliding_window"] is not None
    able = ([SLIDING] if window is not None and windowed else [FULL, SLIDING]) if slides else [FULL]
    if kinds := set(config.get("layer_types") or ()) - set(able):
        faults.append(
            f"layer_types: {', '.join(sorted(map(str, kinds)))} is not supported; supported: {', '.join(able)}"
        )
    return faults + _quantized(config)


def _quantized(config: Noted) -> list[str]:
    stated = config.get("quantization_config")
    if not stated:
        return []
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    how = f" ({method} {stated.get('quant_algo', '')}".rstrip() + ")" if method else ""
    return [
        f"quantized weights{how} are for serving; open the float model that they were made from, or dequantize them"
    ]


def hf_faults(shape: ModelShape, architecture: Architecture) -> list[str]:
    """Why a ``config.json`` of the family cannot describe a model; empty if it can."""
    faults, family = [], hf_family(architecture.family)
    if not shape.uniform and family.by_layer is None:
        able = ", ".join(name for name, other in hf_families().items() if other.by_layer is not None)
        faults.append(
            f"family {architecture.family!r}: Hugging Face has no form of its models whose layers differ in size (of "
            f"these it has: {able})"
        )
    if architecture.moe_router_pre_softmax and family.normalized is None:
        faults.append(f"family {architecture.family!r}: transformers always normalises the weights of its experts")
    types = architecture.layer_types or ()
    if architecture.windowed and (family.windowed is None or not shape.uniform or FULL in types):
        faults.append(
            f"family {architecture.family!r}: Hugging Face has no form of its models with these sliding windows (of "
            "Mistral's it has, with one in every layer and layers of one size)"
        )
    if architecture.rotary_scaling is not None and not axes.family(architecture.family).scales_rotary:
        faults.append(f"family {architecture.family!r}: transformers has no scaled RoPE for its models")
    return faults


def to_hf(shape: ModelShape, architecture: Architecture, *, dtype: str) -> dict[str, Any]:
    """The ``config.json`` of a model of these sizes whose tensors are stored as ``dtype``.

    ``head_dim`` is always explicit, because pruning leaves ``heads * head_dim`` and ``hidden`` unequal; transformers
    reads it in every family here. A model whose layers have sizes of their own is written as NVIDIA's Llama-Nemotron
    models are, with ``block_configs``.

    Raises:
        CheckpointError: as :func:`hf_faults`.
    """
    if faults := hf_faults(shape, architecture):
        raise CheckpointError("; ".join(faults))
    family, table = hf_family(architecture.family), axes.family(architecture.family)
    kind, blocks = (family.architecture, family.model_type), {}
    if architecture.windowed:
        assert family.windowed is not None
        kind = family.windowed
    if not shape.uniform:
        assert family.by_layer is not None
        kind, blocks = family.by_layer, {"block_configs": write_blocks(shape)}
    rotary = spellings(
        architecture.rotary_base,
        architecture.rotary_percent,
        architecture.rotary_scaling,
        partial_rotary=table.partial_rotary,
    )
    config: dict[str, Any] = {
        "architectures": [kind[0]],
        "model_type": kind[1],
        "attention_dropout": 0.0,
        "bos_token_id": architecture.bos_token_id,
        "eos_token_id": architecture.eos_token_id,
        "pad_token_id": architecture.pad_token_id,
        "head_dim": shape.head_dim,
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": None if blocks else shape.ffn_hidden_size,
        "max_position_embeddings": architecture.max_position_embeddings,
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": None if blocks else shape.num_query_groups,
        family.epsilon: architecture.norm_epsilon,
        "sliding_window": architecture.sliding_window,
        **(type_spellings(architecture, rotary) if table.layer_types else rotary),
        "tie_word_embeddings": shape.tied_embeddings,
        "torch_dtype": dtype,
        "dtype": dtype,
        **_library_version(),
        "use_cache": True,
        "vocab_size": shape.vocab_size,
        **family.writes,
        **blocks,
    }
    if family.expert:
        config |= {
            family.experts: shape.num_moe_experts,
            family.width: shape.ffn_hidden_size,
            "num_experts_per_tok": architecture.moe_router_topk,
            "router_aux_loss_coef": architecture.moe_aux_loss_coeff,
        }
        if family.normalized is not None:
            config[family.normalized] = not architecture.moe_router_pre_softmax
    return config


def _library_version() -> dict[str, str]:
    """``transformers_version``, which transformers and other readers look at; nothing where it is not installed."""
    try:
        return {"transformers_version": metadata.version("transformers")}
    except metadata.PackageNotFoundError:
        return {}
