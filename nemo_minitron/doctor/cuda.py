"""Which drivers and GPUs a build of torch for a given CUDA version runs on."""

from __future__ import annotations

__all__ = ["driver_needed", "oldest_gpu"]

#: Smallest Linux driver of each CUDA's minor-version compatibility (release notes of the CUDA Toolkit).
_DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
#: Compute capability below which NVIDIA's libraries of a CUDA have no code (the same notes: what each release dropped).
_OLDEST = {11: "3.5", 12: "5.0", 13: "7.5"}


def driver_needed(cuda: str) -> str | None:
    """Oldest driver that runs a build for this CUDA version ("12.8"), or None if it is not known."""
    return _DRIVERS.get(_major(cuda))


def oldest_gpu(cuda: str) -> str | None:
    """Smallest compute capability that a build for this CUDA version has code for, or None if it is not known."""
    return _OLDEST.get(_major(cuda))


def _major(version: str) -> int:
    major = version.partition(".")[0]
    return int(major) if major.isdigit() else 0
