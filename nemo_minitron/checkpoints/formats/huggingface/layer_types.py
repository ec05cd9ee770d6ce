"""Layers of two types in a ``config.json``: the list of types, the window, and rotary embeddings by type of layer.

transformers up to 4.52 knows only a pattern (``sliding_window_pattern``: each n-th layer has full attention), later
ones ``layer_types``. transformers 5 has the rotary embeddings by type in ``rope_parameters``; before, sliding layers
had a key of their own, ``rope_local_base_freq``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_minitron.architecture import FULL, SLIDING, Architecture, period_of, types_of
from nemo_minitron.checkpoints.formats.huggingface.rotary import older_spelling, scaling_type

__all__ = ["older_spelling_by_type", "read_layer_types", "type_spellings"]

_PATTERNS = ("_sliding_window_pattern", "sliding_window_pattern")
_PATTERN = 6  # of transformers, where a file says nothing
_LOCAL = "rope_local_base_freq"


def older_spelling_by_type(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """:func:`~.rotary.older_spelling` of a family whose ``rope_parameters`` may be by type of layer."""
    config, newer = dict(config), config.get("rope_parameters")
    if not (isinstance(newer, dict) and newer.keys() & {FULL, SLIDING}):
        return older_spelling(config)
    faults = [
        f"rope_parameters.{key}={value!r}: must be an object, for {FULL} or {SLIDING}"
        for key, value in newer.items()
        if key not in (FULL, SLIDING) or not isinstance(value, dict)
    ]
    if faults:
        return {key: value for key, value in config.items() if key != "rope_parameters"}, faults
    older, faults = older_spelling({**config, "rope_parameters": newer.get(FULL)})
    sliding, more = older_spelling({"rope_parameters": newer.get(SLIDING)})
    faults += [fault.replace("rope_parameters", f"rope_parameters.{SLIDING}") for fault in more]
    local, scaling = sliding.pop("rope_theta", None), sliding.pop("rope_scaling", None)
    if scaling_type(scaling) != "default":
        faults.append(f"rope_parameters.{SLIDING}={newer[SLIDING]!r}: RoPE of sliding layers is not scaled")
    faults += [f"rope_parameters.{SLIDING}.{key}={value!r} is not supported" for key, value in sliding.items()]
    if local is not None and older.get(_LOCAL) not in (None, local):
        faults.append(
            f"{_LOCAL}={older[_LOCAL]!r} and rope_parameters.{SLIDING}.rope_theta={local!r} differ; "
            "remove the wrong one"
        )
    return older if local is None else {**older, _LOCAL: local}, faults


def read_layer_types(config: Mapping[str, Any], layers: int) -> tuple[tuple[str, ...], list[str]]:
    """The type of each layer, and the faults of what the configuration says of it.

    ``layer_types`` count, as in current transformers; a pattern that contradicts them is refused, since transformers up
    to 4.52 goes by it.
    """
    stated = config.get("layer_types")
    given = {key: value for key in _PATTERNS if (value := config.get(key)) is not None}
    faults = [
        f"{key}={value!r}: must be a whole number of at least 1"
        for key, value in given.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < 1
    ]
    if faults:
        return (FULL,) * layers, faults
    if stated is None:
        patterns = set(given.values()) or {_PATTERN}
        if len(patterns) > 1:
            return (FULL,) * layers, [f"{' and '.join(f'{key}={n}' for key, n in given.items())} differ"]
        return types_of(patterns.pop(), layers), []
    if not isinstance(stated, list) or len(stated) != layers:
        return (FULL,) * layers, [f"layer_types={stated!r}: must name the types of {layers} layers"]
    if other := sorted({str(kind) for kind in stated} - {FULL, SLIDING}):
        return (FULL,) * layers, [f"layer_types: {', '.join(other)} is not supported; supported: {FULL}, {SLIDING}"]
    if (pattern := given.get(_PATTERNS[1])) is not None and types_of(pattern, layers) != tuple(stated):
        return (FULL,) * layers, [
            f"sliding_window_pattern={pattern} and layer_types={stated!r} differ; remove the wrong one"
        ]
    return tuple(stated), []


def type_spellings(architecture: Architecture, rotary: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of layer types and of rotary embeddings, for a ``config.json`` that any generation reads.

    Types without a pattern are written with the pattern null: transformers that know only patterns then fail instead of
    computing another model.

    Args:
        architecture: of a family with layer types.
        rotary: of layers with full attention (:func:`~.rotary.spellings`).
    """
    assert architecture.layer_types is not None
    local, scalar = architecture.rotary_base_local, architecture.query_pre_attn_scalar
    whole = scalar is not None and float(scalar).is_integer()  # transformers 5 takes nothing else
    return {
        **rotary,
        _LOCAL: local,
        "rope_parameters": {
            FULL: rotary["rope_parameters"],
            SLIDING: {"rope_type": "default", "rope_theta": local},
        },
        "layer_types": list(architecture.layer_types),
        "sliding_window": architecture.sliding_window,
        "sliding_window_pattern": period_of(architecture.layer_types),
        "query_pre_attn_scalar": int(scalar) if whole and scalar is not None else scalar,
    }
