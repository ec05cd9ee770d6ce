"""Attribute values in NeMo-Aligner's text form: ``helpfulness:4,verbosity:1``."""

from __future__ import annotations

import re

from nemo_minitron.errors import DataError

__all__ = ["parse_attribute_string"]


def parse_attribute_string(text: str) -> dict[str, int]:
    """``verbosity=1,complexity=2`` or ``verbosity:1`` as a mapping.

    Raises:
        DataError: for anything else.
    """
    values = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*[=:]\s*(-?\d+)\s*", part)
        if match is None or match[1] in values:
            raise DataError(f"attributes {text!r}: {part!r} is no name=number, or the name again; write verbosity=1")
        values[match[1]] = int(match[2])
    return values
