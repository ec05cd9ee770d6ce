"""Open and write checkpoints: a table of formats (:mod:`nemo_minitron.checkpoints.formats`), and one class for all of
them (:mod:`nemo_minitron.checkpoints.base`).

``open_checkpoint`` detects the format of a path; ``write_checkpoint`` writes any opened checkpoint in any format. So
three readers and three writers convert in all six directions. Importing this package imports neither torch nor NeMo.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_minitron._lazy import lazy
from nemo_minitron.checkpoints.base import Checkpoint, Weights

if TYPE_CHECKING:
    from nemo_minitron.checkpoints.io import open_checkpoint, write_checkpoint
    from nemo_minitron.checkpoints.live import load_into
    from nemo_minitron.checkpoints.verification.compare import verify

__all__ = ["Checkpoint", "Weights", "load_into", "open_checkpoint", "verify", "write_checkpoint"]

__getattr__ = lazy(
    __name__,
    {"load_into": "live", "open_checkpoint": "io", "verify": "verification.compare", "write_checkpoint": "io"},
)
