"""Releases of NVIDIA's stack: those that this suite supports, and the differences between them.

Everything that depends on a version of NeMo, Megatron-core, NeMo-Aligner, torch or transformers is decided here; the
other modules do not compare versions. ``make matrix`` runs the smoke tests with every entry of :data:`PAIRS`;
docs/cluster.md has the results.

Importing this module imports nothing of the stack: versions are read from the metadata of what is installed.
"""

from __future__ import annotations

import functools
import importlib.metadata
from dataclasses import dataclass, field
from typing import Any

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from nemo_minitron.errors import ShapeError

__all__ = [
    "PAIRS",
    "PINNED",
    "SUPPORTED",
    "WITH_NEMO_1",
    "Pair",
    "block_arguments",
    "installed",
    "layer_layout",
    "matches",
    "pair_of",
    "virtual_pipeline_stage",
]


@dataclass(frozen=True)
class Pair:
    """A release of NeMo with one of Megatron-core, and the other versions of such an environment.

    Attributes:
        name: for the command line and the table.
        nemo: version of nemo-toolkit.
        megatron: version of megatron-core.
        torch: version of torch.
        container: tag of the ``nvcr.io/nvidia/nemo`` image that holds the pair; None if no image does.
        pins: further distributions whose version differs from constraints.txt; None if there is none.
    """

    name: str
    nemo: str
    megatron: str
    torch: str
    container: str | None = None
    pins: dict[str, str | None] = field(default_factory=dict)

    def overrides(self) -> dict[str, str | None]:
        """Versions that differ from constraints.txt, by distribution."""
        return {"nemo-toolkit": self.nemo, "megatron-core": self.megatron, "torch": self.torch, **self.pins}


#: The pair of constraints.txt.
PINNED = Pair("pinned", nemo="2.4.1", megatron="0.13.1", torch="2.13.0")

#: Newest first. The oldest is where :data:`SUPPORTED` begins.
PAIRS: tuple[Pair, ...] = (
    PINNED,
    Pair("nemo-25.07", nemo="2.4.0", megatron="0.13.0", torch="2.13.0", container="25.07"),
    Pair(
        "nemo-25.04",
        nemo="2.3.3",
        megatron="0.12.3",
        # Megatron-core 0.12 cannot save through the file writer of torch 2.13: _write_item() asks for
        # serialization_format, which came with torch 2.8.
        torch="2.7.1",
        container="25.04",
        # What nemo-toolkit 2.3 itself pins, and what follows from it.
        pins={"numba": "0.61.0", "llvmlite": None, "protobuf": "4.24.4", "onnx": None, "setuptools": None},
    ),
)

#: What each part of the suite works with, by distribution. Older ones are refused by name; newer ones are tried.
SUPPORTED: dict[str, str] = {
    "torch": ">=2.7",
    "megatron-core": ">=0.12",
    "nemo-toolkit": ">=2.3",
    "nemo-aligner": ">=0.7",
    "transformers": ">=4.51",
    "numpy": ">=1.24",
    "lm-eval": ">=0.4.9",
    "datasets": ">=2.19",
    "gguf": ">=0.10",
    "nvidia-modelopt": ">=0.37",
    "pyarrow": ">=14",
    "matplotlib": ">=3.7",
}


#: Releases of nemo-toolkit with the models that nemo-aligner subclasses; 2.5 dropped MegatronGPTModel.
WITH_NEMO_1 = ">=2.3,<2.5"


@functools.cache
def installed(distribution: str) -> Version | None:
    """Version of an installed distribution; None where it is not installed, or its metadata names no version.

    NVIDIA's builds ("2.7.0a0+79aa17489c.nv25.04") count as the release that they precede ("2.7.0").
    """
    try:
        return Version(Version(importlib.metadata.version(distribution)).base_version)
    except (importlib.metadata.PackageNotFoundError, InvalidVersion, TypeError):
        return None


def matches(requirement: str) -> bool:
    """Whether the installed version fulfils a requirement such as ``"megatron-core>=0.13"``.

    A distribution that is not installed, or states no version, counts as the pinned release.
    """
    wanted = Requirement(requirement)
    version = installed(wanted.name)
    if version is None:
        pinned = PINNED.overrides().get(wanted.name)
        return pinned is None or wanted.specifier.contains(pinned)
    return wanted.specifier.contains(version, prereleases=True)


def layer_layout(pipeline_stages: list[list[str]] | None) -> dict[str, Any]:
    """Keyword arguments that set the layers of each pipeline stage, for Megatron's configuration and NeMo's strategy.

    Args:
        pipeline_stages: the parts of each stage; None where all hold equally many layers.

    Raises:
        ShapeError: for stages of different sizes below megatron-core 0.13, which brought the argument.
    """
    if matches("megatron-core>=0.13"):
        return {"pipeline_model_parallel_layout": pipeline_stages}
    if pipeline_stages is not None:
        sizes = ", ".join(str(stage.count("decoder")) for stage in pipeline_stages)
        raise ShapeError(
            f"pipeline stages of {sizes} layers need megatron-core 0.13, but {installed('megatron-core')} is here; "
            "let parallel.pipeline divide the number of layers"
        )
    return {}


def virtual_pipeline_stage(stage: int | None) -> dict[str, Any]:
    """Keyword arguments that set the virtual pipeline stage of a model chunk.

    Raises:
        ShapeError: for virtual stages below megatron-core 0.13, which keeps the stage in a global instead.
    """
    if matches("megatron-core>=0.13"):
        return {"vp_stage": stage}
    if stage is not None:
        raise ShapeError(
            f"parallel.virtual_pipeline needs megatron-core 0.13, and {installed('megatron-core')} is installed; "
            "leave it out"
        )
    return {}


def block_arguments(block: Any) -> dict[str, Any]:
    """Keyword arguments, beside configuration and number, by which a ``TransformerBlock`` builds its layers."""
    if matches("megatron-core>=0.13"):
        return {"model_comm_pgs": block.model_comm_pgs, "vp_stage": block.vp_stage}
    return {}


def pair_of(nemo: Version | None, megatron: Version | None) -> Pair | None:
    """The known pair of these two versions; None where it is not one of :data:`PAIRS`."""
    for pair in PAIRS:
        if (nemo, megatron) == (Version(pair.nemo), Version(pair.megatron)):
            return pair
    return None
