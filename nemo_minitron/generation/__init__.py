"""Text from a live Megatron model: sampling, key-value cache, any layout. See ``docs/generation.md``.

Torch and Megatron are imported when a name is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_minitron.generation.decode import Answer, generate_tokens
    from nemo_minitron.generation.sampling import Sampling

__all__ = ["Answer", "Sampling", "generate_tokens"]

_HOME = {"Answer": "decode", "Sampling": "sampling", "generate_tokens": "decode"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
