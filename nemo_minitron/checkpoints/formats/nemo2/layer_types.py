"""Sliding windows in NeMo 2's configurations.

Every layer has the same (``MistralConfig7B``), or layers are of two types (``Gemma3Config``, which has a pattern and no
list).

NeMo gives Transformer Engine the window as tokens before a query's own, so a ``window_size`` of n lets a query see
n + 1 tokens, where transformers' ``sliding_window`` counts the query's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_minitron.architecture import FULL, SLIDING, Architecture, period_of, types_of
from nemo_minitron.errors import CheckpointError
from nemo_minitron.shape import ModelShape

__all__ = [
    "list_faults",
    "read_scaling",
    "read_types",
    "read_window",
    "rotary_faults",
    "window_faults",
    "written_types",
    "written_window",
]


def rotary_faults(architecture: Architecture) -> list[str]:
    """Why NeMo's configuration of a model with sliding windows cannot describe its RoPE; empty if it can."""
    if architecture.layer_types is None or architecture.rotary_type in ("default", "linear"):
        return []
    return [
        f"format=nemo2: NeMo scales RoPE of {architecture.family} models with sliding windows linearly alone, not by "
        f"the type {architecture.rotary_type!r}; write the hf format"
    ]


def list_faults(architecture: Architecture) -> list[str]:
    """Why NeMo alone, without this package, cannot open a model: its layers' types follow no pattern. Or empty."""
    types = architecture.layer_types
    if types is None or architecture.windowed or period_of(types) is not None:
        return []
    shown = "".join("F" if kind == FULL else "s" for kind in types)
    return [
        f"NeMo's {architecture.family} layers have full attention at every n-th place, and the types of this model's "
        f"layers follow no such pattern ({shown}: F full, s sliding), so others could not open the export; export the "
        "hf format"
    ]


def written_types(architecture: Architecture, rows: int) -> dict[str, Any]:
    """Values of a ``Gemma3Config``, or of the class in :mod:`listed`.

    Args:
        architecture: of a family with layer types.
        rows: of the vocabulary; NeMo's embedding takes them from the configuration and never from the tokenizer.

    Raises:
        CheckpointError: for RoPE that is scaled otherwise than linearly.
    """
    if faults := rotary_faults(architecture):
        raise CheckpointError("; ".join(faults))
    assert architecture.layer_types is not None, "of a family with layer types"
    assert architecture.sliding_window is not None, "of a family with layer types"
    scaling = architecture.rotary_scaling
    period = period_of(architecture.layer_types)
    types: dict[str, Any] = (
        # without a pattern NeMo's own classes would fail; the list is of ours
        {"interleaved_attn_pattern": None, "layer_types": list(architecture.layer_types)}
        if period is None
        else {"interleaved_attn_pattern": (period - 1, 1)}
    )
    bases = (architecture.rotary_base_local or 0.0, architecture.rotary_base)
    return {
        "window_size": architecture.sliding_window - 1,
        **types,
        "rotary_base": tuple(int(base) if float(base).is_integer() else base for base in bases),
        "seq_len_interpolation_factor": None,  # NeMo would apply it to sliding layers too
        "rope_scaling_factor": 1.0 if scaling is None else float(scaling["factor"]),
        "softmax_scale": architecture.softmax_scale,
        # without it Megatron does not sum the gradients of these norms over tensor-parallel ranks
        "qk_layernorm": True,
        "vocab_size": rows,
    }


def window_faults(architecture: Architecture, *, offered: bool) -> list[str]:
    """Why NeMo has no configuration of a model with the windows that it has; empty if it has one.

    Args:
        architecture: the model's.
        offered: NeMo has a class for the family's models whose layers all slide.
    """
    if not architecture.windowed or (offered and FULL not in (architecture.layer_types or ())):
        return []
    return [
        f"format=nemo2: NeMo has no configuration of {architecture.family} models with these sliding windows; write "
        "the hf format"
    ]


def written_window(architecture: Architecture) -> dict[str, Any]:
    """Values of a configuration whose layers all have the window; none without one."""
    if not architecture.windowed:
        return {}
    assert architecture.sliding_window is not None, "of a model with windows"
    return {"window_size": [architecture.sliding_window - 1, 0]}


def read_window(config: Mapping[str, Any]) -> dict[str, Any]:
    """The constants of a window that every layer has, out of a ``model.yaml``; empty where it hides nothing.

    Raises:
        KeyError, TypeError, ValueError: where a value is missing or of the wrong kind.
    """
    window = config.get("window_size")
    if window is None or window[0] + 1 >= config["seq_length"]:
        return {}
    before, after = window
    if before < 0 or after != 0:
        raise ValueError(f"window_size={window}: must be the number of tokens before a query's own, and 0")
    return {"layer_types": (SLIDING,) * config["num_layers"], "sliding_window": int(before) + 1}


def read_types(config: Mapping[str, Any], shape: ModelShape) -> dict[str, Any]:
    """The constants of a family with layer types, out of a ``model.yaml``.

    Raises:
        KeyError, TypeError, ValueError: where a value is missing or of the wrong kind.
    """
    types = config.get("layer_types")
    if types is None:
        sliding, full = config["interleaved_attn_pattern"]
        types = types_of(sliding + full, shape.num_layers)
    scale = config.get("softmax_scale")
    return {
        "layer_types": tuple(types),
        "sliding_window": int(config["window_size"]) + 1,
        "rotary_base_local": float(config["rotary_base"][0]),
        "query_pre_attn_scalar": float(shape.head_dim) if scale is None else float(f"{float(scale) ** -2:.9g}"),
    }


def read_scaling(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """HF's ``rope_scaling`` of the layers with full attention."""
    factor = float(config.get("rope_scaling_factor", 1.0))
    return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}
