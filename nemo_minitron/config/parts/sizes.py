"""Sizes of files, as transformers spells them."""

from __future__ import annotations

import re

__all__ = ["SHARD_SIZE", "parse_bytes", "shard_size_faults"]

#: What a file of weights may hold where no setting says it; transformers' own.
SHARD_SIZE = "5GB"

_SMALLEST = "1MB"
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)}


def parse_bytes(text: str) -> int:
    """``"5GB"`` -> 5,000,000,000; ``"512MiB"`` in powers of 1024; a plain number is in bytes.

    Raises:
        ValueError: if it is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write a number with its unit, such as 5GB or 512MiB")
    return int(float(match[1]) * _UNITS[match[2]])


def shard_size_faults(value: str) -> list[str]:
    """What is wrong with the setting ``max_shard_size``."""
    try:
        if parse_bytes(value) >= parse_bytes(_SMALLEST):
            return []
    except ValueError as error:
        return [f"max_shard_size={value}: {error}"]
    return [f"max_shard_size={value}: must be at least {_SMALLEST}; such as 5GB"]
