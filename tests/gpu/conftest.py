"""The tier's device, and the CPU's answers that the device's are held against."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tier import DEVICE_VARIABLE, device_name, one_process, run_cases
from support.tier_cases import FAMILIES

os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # before CUDA starts: NVIDIA's containers switch TF32 on
if os.environ.get(DEVICE_VARIABLE) == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def device() -> str:
    """ "cuda", or "cpu" where ``MINITRON_GPU_TIER_DEVICE`` says so."""
    return device_name()


@pytest.fixture(scope="session")
def groups(device: str) -> Iterator[Any]:
    """Groups of one process, in this process, for kernels."""
    with one_process(device) as found:
        yield found


@pytest.fixture(scope="session")
def place(groups: Any) -> torch.device:
    """Where tensors go."""
    found: torch.device = groups.device.torch
    return found


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the models of every family do on the CPU, in float32."""
    folder = tmp_path_factory.mktemp("reference")
    settings = {"families": list(FAMILIES), "dtype": "float32"}
    found: dict[str, dict[str, Any]] = run_cases(folder, "model_case", device="cpu", settings=settings)[0]
    return found


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the results of processes."""
    return tmp_path_factory.mktemp("cases")
