"""The names that transformers uses in each model family, as reader and writer look them up."""

from __future__ import annotations

from nemo_minitron import axes
from nemo_minitron.errors import CheckpointError
from nemo_minitron.families.entry import HFFamily

__all__ = ["hf_families", "hf_family"]


def hf_families() -> dict[str, HFFamily]:
    """The families that transformers has, by name."""
    return {name: table.hf for name, table in axes.FAMILIES.items() if table.hf is not None}


def hf_family(name: str) -> HFFamily:
    """The names that transformers uses for a family.

    Raises:
        CheckpointError: if transformers does not know the family.
    """
    known = hf_families()
    if name not in known:
        raise CheckpointError(
            f"family {name!r} has no Hugging Face form; write another format, or add the form to "
            f"nemo_minitron/families/{name}.py (there: {', '.join(known)})"
        )
    return known[name]
