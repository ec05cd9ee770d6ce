"""Functions that the formats of NeMo 1 and NeMo 2 share: Lightning's state, padded vocabularies, YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_minitron import parsing
from nemo_minitron.errors import CheckpointError, first_line

__all__ = ["COMMON", "padded", "parse_yaml"]

COMMON = {"epoch": 0, "global_step": 0, "state_dict": {}, "loops": {}, "callbacks": {}, "optimizer_states": []}
"""The objects of Lightning that NeMo's loaders look for in a distributed checkpoint; of a training they hold more."""


def padded(vocab_size: int, multiple: int) -> int:
    """Vocabulary rows as NeMo stores them at TP 1: the next multiple."""
    return -(-vocab_size // multiple) * multiple


def parse_yaml(data: bytes, path: Path) -> dict[str, Any]:
    """A YAML mapping as plain data; ``path`` names it in messages.

    Raises:
        CheckpointError: if it is no YAML mapping; tags that build Python objects are refused.
    """
    import yaml

    try:
        content = parsing.parse_yaml(data)
    except (ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read as plain YAML ({first_line(error)}); restore the file") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a model description; restore the file")
    return content
