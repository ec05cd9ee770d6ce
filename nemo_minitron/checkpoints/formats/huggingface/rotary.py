"""Rotary embeddings in a ``config.json``: as transformers 4 spells them, and as transformers 5 does.

transformers 4 has ``rope_theta``, ``partial_rotary_factor`` and ``rope_scaling``; transformers 5 has one object with
all of it, ``rope_parameters``. The older ones ignore the newer key, and compute another model without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.accounting import unread, warn_once

__all__ = ["SCALING", "older_spelling", "read_scaling", "scaling_faults", "scaling_type", "spellings"]

#: Types of RoPE scaling -> the keys that each needs; their values are numbers.
SCALING: dict[str, tuple[str, ...]] = {
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "linear": ("factor",),
    "yarn": (),
}

#: Further keys of a type, numbers too.
OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
    ),
}

#: Keys of any type -> why they change nothing.
HARMLESS = {"finetuned": "a note of those who trained the model"}

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


def scaling_faults(scaling: Any, *, positions: Any = None, partial: Any = 1.0) -> list[str]:
    """What in a ``rope_scaling`` is not of its type.

    Args:
        scaling: as transformers 4 has it.
        positions: ``max_position_embeddings``.
        partial: ``partial_rotary_factor``.
    """
    if scaling is not None and not isinstance(scaling, dict):
        return [f"rope_scaling={scaling!r}: must be an object or null"]
    kind, scaling = scaling_type(scaling), scaling or {}
    if kind not in SCALING:
        return [f"rope_scaling of type {kind!r} is not supported; supported: {', '.join(SCALING)}"]
    faults = []
    types = [scaling[key] for key in ("rope_type", "type") if scaling.get(key) is not None]
    if len(types) == 2 and types[0] != types[1]:
        faults.append(f"rope_scaling has rope_type={types[0]!r} and type={types[1]!r}; remove one of them")
    needed, others = SCALING[kind], OPTIONAL.get(kind, ())
    for key in needed + others:
        if key in others and scaling.get(key) is None:
            continue
        if isinstance(scaling.get(key), bool) or not isinstance(scaling.get(key), int | float):
            faults.append(f"rope_scaling.{key}={scaling.get(key)!r}: type {kind!r} needs a number")
    mine = ("rope_type", "type", *needed, *others, *(("truncate",) if kind == "yarn" else ()))
    active, _ = unread({key: value for key, value in scaling.items() if key not in mine}, harmless=HARMLESS)
    faults += [f"rope_scaling.{key}={value!r} is not known in type {kind!r}" for key, value in active.items()]
    if not faults and kind in ("linear", "yarn"):
        faults += _range_faults(kind, scaling, positions, partial)
    return faults


def _range_faults(kind: str, scaling: Mapping[str, Any], positions: Any, partial: Any) -> list[str]:
    """Values that the type cannot have. All that is there is a number."""
    limits: dict[str, tuple[Callable[[float], bool], str]] = {
        "factor": (lambda value: value >= 1, "at least 1"),
        "attention_factor": (lambda value: value > 0, "a number above 0"),
        "original_max_position_embeddings": (lambda value: value >= 1 and value == int(value), "a number of tokens"),
    }
    faults = [
        f"rope_scaling.{key}={value!r}: type {kind!r} needs {least}"
        for key, (fits, least) in limits.items()
        if (value := scaling.get(key)) is not None and not (math.isfinite(value) and fits(value))
    ]
    if faults or kind != "yarn":
        return faults
    if scaling.get("truncate") not in (None, True):
        faults.append(
            f"rope_scaling.truncate={scaling['truncate']!r} is not supported: transformers 4 ignores it and computes "
            "another model"
        )
    fast, slow = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1
    if fast <= slow:
        faults.append(f"rope_scaling.beta_fast={fast!r} must be above beta_slow={slow!r}")
    if partial != 1:
        faults.append(f"rope_scaling of type 'yarn' with partial_rotary_factor={partial!r} is not supported")
    factor, original, context = _yarn_context(scaling, positions)
    if factor is None:
        faults.append("rope_scaling of type 'yarn' needs factor, or original_max_position_embeddings")
    elif context / original != factor:
        faults.append(
            f"rope_scaling.factor={factor!r} times original_max_position_embeddings={original!r} is no number of "
            "tokens, which transformers 4 needs for max_position_embeddings"
        )
    return faults


def read_scaling(scaling: Any, positions: int, source: Path | None = None) -> tuple[dict[str, Any] | None, int]:
    """The ``rope_scaling`` of a model without keys that say nothing, and its longest sequence.

    Of "yarn" transformers 4 takes ``max_position_embeddings / original_max_position_embeddings`` for the factor where
    it is told the original context, whatever ``factor`` says; transformers 5 and vLLM take ``factor``, as here. What is
    returned gives all of them the same: the longest sequence is the product of the two, which the factor is meant for.
    Where that is another number than the file's, a warning says so.

    Args:
        scaling: as transformers 4 has it; one with faults gives none.
        positions: ``max_position_embeddings``.
        source: names the file in the warning; None: there is none.
    """
    kind = scaling_type(scaling)
    if kind == "default" or scaling_faults(scaling, positions=positions):
        return None, positions
    if kind == "llama3":
        return scaling, positions
    numbers = {key: scaling[key] for key in SCALING[kind] + OPTIONAL.get(kind, ()) if scaling.get(key)}
    if kind == "yarn":
        factor, original, context = _yarn_context(scaling, positions)
        numbers |= {"factor": factor, "original_max_position_embeddings": original}
        if context != positions and source is not None:
            warn_once(
                source,
                f"max_position_embeddings={positions} is not factor={factor:g} times "
                f"original_max_position_embeddings={original} of rope_scaling, which transformers 4 would take for "
                f"another factor; read as max_position_embeddings={context}",
            )
        positions = context
    tokens = ("original_max_position_embeddings",)
    return {
        "rope_type": kind,
        **{key: int(value) if key in tokens else float(value) for key, value in numbers.items()},
    }, positions


def _yarn_context(scaling: Mapping[str, Any], positions: Any) -> tuple[Any, Any, Any]:
    """Factor, original context and context of "yarn"; the factor is None where nothing says it."""
    factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    if factor is None:
        return (None, None, None) if original is None else (positions / original, original, positions)
    original = positions if original is None else original
    return factor, original, positions if positions / original == factor else round(factor * original)


def _plain(scaling: Any) -> dict[str, Any]:
    """A scaling with its type under one name and nothing that says nothing; not an object, it is like no other."""
    if scaling is not None and not isinstance(scaling, dict):
        return {"": scaling}
    known = {key: value for key, value in (scaling or {}).items() if key != "type" and value is not None}
    return {**known, "rope_type": scaling_type(scaling)}
