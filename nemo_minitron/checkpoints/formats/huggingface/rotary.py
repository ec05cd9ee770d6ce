"""Rotary embeddings in a ``config.json``: as transformers 4 spells them, and as transformers 5 does.

transformers 4 has ``rope_theta``, ``partial_rotary_factor`` and ``rope_scaling``; transformers 5 has one object with
all of it, ``rope_parameters``. The older ones ignore the newer key, and compute another model without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_minitron.accounting import unread

__all__ = ["SCALING", "older_spelling", "scaling_faults", "scaling_type", "spellings"]

#: Types of RoPE scaling -> the keys that each has.
SCALING: dict[str, tuple[str, ...]] = {
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

_OUTSIDE = ("rope_theta", "partial_rotary_factor")


def older_spelling(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A configuration with its ``rope_parameters`` taken apart.

    Returns:
        The configuration in the spelling of transformers 4, and the faults of ``rope_parameters``: where both spellings
        are there, they must agree.
    """
    config = dict(config)
    newer = config.pop("rope_parameters", None)
    if newer is None:
        return config, []
    if not isinstance(newer, dict):
        return config, [f"rope_parameters={newer!r}: must be an object"]
    if layered := [key for key, value in newer.items() if isinstance(value, dict)]:
        return config, [f"rope_parameters by kind of layer ({', '.join(layered)}) are not supported"]
    faults = []
    for key in _OUTSIDE:
        if (value := newer.get(key)) is None:
            continue
        if config.get(key) not in (None, value):
            faults.append(f"{key}={config[key]!r} and rope_parameters.{key}={value!r} differ; remove the wrong one")
        config[key] = value
    # null values say nothing in either generation
    scaling = {key: value for key, value in newer.items() if key not in _OUTSIDE and value is not None}
    older = config.get("rope_scaling")
    if older is not None and _plain(older) != _plain(scaling):
        faults.append(f"rope_scaling={older!r} and rope_parameters={newer!r} differ; remove the wrong one")
    config["rope_scaling"] = None if _plain(scaling) == {"rope_type": "default"} else scaling
    return config, faults


def spellings(
    theta: float, partial: float, scaling: Mapping[str, Any] | None, *, partial_rotary: bool
) -> dict[str, Any]:
    """The keys of rotary embeddings in both spellings, for a ``config.json`` that either generation reads.

    Args:
        theta: base of the frequencies.
        partial: part of each head's channels that is turned.
        scaling: as transformers 4 has it, or None.
        partial_rotary: the family has the key ``partial_rotary_factor``.
    """
    older: dict[str, Any] = {"rope_theta": theta, "rope_scaling": scaling}
    newer = {**_plain(scaling), "rope_theta": theta}
    if partial_rotary:
        older["partial_rotary_factor"] = newer["partial_rotary_factor"] = partial
    return {**older, "rope_parameters": newer}


def scaling_type(scaling: Any) -> str:
    """The type of a ``rope_scaling``, "default" for none."""
    return (scaling.get("rope_type") or scaling.get("type") or "default") if isinstance(scaling, dict) else "default"


def scaling_faults(scaling: Any) -> list[str]:
    """What in a ``rope_scaling`` is not of its type."""
    if scaling is not None and not isinstance(scaling, dict):
        return [f"rope_scaling={scaling!r}: must be an object or null"]
    kind, scaling = scaling_type(scaling), scaling or {}
    if kind not in SCALING:
        return [f"rope_scaling of type {kind!r} is not supported; supported: {', '.join(SCALING)}"]
    faults = []
    types = [scaling[key] for key in ("rope_type", "type") if scaling.get(key) is not None]
    if len(types) == 2 and types[0] != types[1]:
        faults.append(f"rope_scaling has rope_type={types[0]!r} and type={types[1]!r}; remove one of them")
    for key in SCALING[kind]:
        if isinstance(scaling.get(key), bool) or not isinstance(scaling.get(key), int | float):
            faults.append(f"rope_scaling.{key}={scaling.get(key)!r}: type {kind!r} needs a number")
    other = {key: value for key, value in scaling.items() if key not in ("rope_type", "type", *SCALING[kind])}
    active, _ = unread(other, harmless={})
    return faults + [f"rope_scaling.{key}={value!r} is not known in type {kind!r}" for key, value in active.items()]


def _plain(scaling: Any) -> dict[str, Any]:
    """A scaling with its type under one name and nothing that says nothing; not an object, it is like no other."""
    if scaling is not None and not isinstance(scaling, dict):
        return {"": scaling}
    known = {key: value for key, value in (scaling or {}).items() if key != "type" and value is not None}
    return {**known, "rope_type": scaling_type(scaling)}
