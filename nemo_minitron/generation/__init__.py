"""Text from a live Megatron model: sampling, key-value cache, any layout. See ``docs/generation.md``.

Torch and Megatron are imported when a name is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_minitron._lazy import lazy
from nemo_minitron.config import Sampling

if TYPE_CHECKING:
    from nemo_minitron.generation.decode import Answer, generate_tokens

__all__ = ["Answer", "Sampling", "generate_tokens"]

# torch is imported when something is asked for, not when a plan merely imports the package
__getattr__ = lazy(__name__, {"Answer": "decode", "generate_tokens": "decode"})
