"""``generation_config.json``: how a model's makers want answers drawn from it, and which tokens end one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.errors import CheckpointError

__all__ = ["FILE_NAME", "IDS", "generation_config", "read_generation"]

FILE_NAME = "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
#: What transformers writes of itself into a file that it makes from ``config.json``.
_NOTES = ("_from_model_config", "transformers_version")
_MADE = {
    "output_attentions": False,
    "output_hidden_states": False,
    "use_cache": True,
    "cache_implementation": "hybrid",  # of Gemma's configuration in transformers 4
}


def read_generation(content: dict[str, Any], source: Path, architecture: Architecture) -> dict[str, Any]:
    """What a ``generation_config.json`` says beyond the ``config.json`` beside it.

    Args:
        content: of the file.
        source: the file, for messages.
        architecture: as ``config.json`` has it.

    Raises:
        CheckpointError: if a token id in it is none.
    """
    made = _MADE if content.get("_from_model_config") else {}
    own = {
        key: value
        for key, value in content.items()
        if key not in _NOTES
        and not (key in IDS and value in (None, getattr(architecture, key)))
        and not (key in made and type(value) is type(made[key]) and value == made[key])
    }
    for key in IDS:
        ids = own.get(key, [])
        ids = ids if isinstance(ids, list) and key == "eos_token_id" else [ids] if ids != [] else []
        if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in ids):
            raise CheckpointError(f"{source}: {key}={own[key]!r} is no token id; correct or remove it")
    return own


def generation_config(architecture: Architecture) -> dict[str, Any]:
    """The ``generation_config.json`` of a model; the end tokens are those of both its configurations."""
    ids = {key: value for key in IDS if (value := getattr(architecture, key)) is not None}
    if not architecture.generation:
        return {"_from_model_config": True, **ids}
    ends = architecture.end_tokens
    union = {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
    return {**ids, **architecture.generation, **union}
