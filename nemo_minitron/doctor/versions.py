"""Which versions go together, as far as that is known."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PAIRS", "PYTHONS", "TOO_OLD", "Pair", "driver_needed"]


@dataclass(frozen=True)
class Pair:
    """A NeMo and a Megatron-core that belong together.

    Attributes:
        nemo, megatron: versions.
        proven: this suite's tests have passed with them; otherwise NVIDIA ships them together, and that is all.
        container: of NVIDIA's that has them, or "".
    """

    nemo: str
    megatron: str
    proven: bool
    container: str = ""


PAIRS = (Pair("2.4.1", "0.13.1", proven=True), Pair("2.4.0", "0.13.0", proven=False, container="25.07"))
"""The newest first."""
TOO_OLD = (2, 2)
"""NeMo versions below this have no ``nemo.collections.llm`` as this suite uses it; 2.5 has none of NeMo 1's models,
which nemo-aligner trains."""
PYTHONS = ((3, 11), (3, 13))
"""The oldest and the newest Python that the stack installs on."""

#: Smallest Linux driver of each CUDA's minor-version compatibility (CUDA Toolkit release notes, table 2).
_DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
#: Compute capability below which NVIDIA's libraries of a CUDA have no code.
OLDEST_GPU = {11: 3.5, 12: 5.0, 13: 7.5}


def driver_needed(cuda: str) -> str | None:
    """Oldest driver that runs a build for this CUDA ("12.8"), or None where that is not known."""
    major = cuda.partition(".")[0]
    return _DRIVERS.get(int(major)) if major.isdigit() else None
