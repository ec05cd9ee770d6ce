"""The GPU tier itself, tried on the CPU: a part of it runs and passes, and nobody gets it without asking."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
#: Kernels, a stage, live models in their own process: every way in which the tier runs things.
PART = [
    "tests/gpu/test_kernels.py",
    "tests/gpu/test_models.py::test_float32_equals_the_cpu[llama-local]",
    "tests/gpu/test_models.py::test_distillation_steps",
    "tests/gpu/test_stages.py::test_a_stage_does_as_on_the_cpu[prune-local]",
]


def pytest_of_the_tier(*arguments: str, device: str | None) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name != "MINITRON_GPU_TIER_DEVICE"}
    if device is not None:
        variables["MINITRON_GPU_TIER_DEVICE"] = device
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=550, check=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_part_of_the_tier_passes_on_the_cpu() -> None:
    done = pytest_of_the_tier("-m", "gpu", *PART, device="cpu")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    last = done.stdout.splitlines()[-1]
    assert "passed" in last
    assert "skipped" not in last, done.stdout[-2000:]
    assert "deselected" not in last


@pytest.mark.slow
def test_nobody_gets_the_tier_unasked() -> None:
    done = pytest_of_the_tier("tests/gpu", "-q", device=None)
    assert done.returncode == 5, done.stdout  # nothing was selected
    assert "deselected" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", ["kl", "prune"])
def test_without_a_gpu_it_says_so_in_one_line(benchmark: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    tier = pytest_of_the_tier("-m", "gpu", "tests/gpu/test_kernels.py", device=None)
    assert tier.returncode == 4
    assert "the GPU tier: torch sees no CUDA device" in tier.stderr
    done = subprocess.run(
        [sys.executable, f"benchmarks/{benchmark}.py", "--device", "cuda", "--quick"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "CUDA" in line]
    assert lines == ["--device cuda: torch sees no CUDA device here; use --device cpu or auto"]
