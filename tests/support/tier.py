"""What the GPU tier (``tests/gpu``) starts from: its device, its processes, its tolerances, what a machine lacks."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

TESTS = Path(__file__).resolve().parents[1]
DEVICE_VARIABLE = "MINITRON_GPU_TIER_DEVICE"
SPEC_VARIABLE = "MINITRON_LAYER_SPEC"

#: Largest difference, in parts of the largest entry of the CPU's float32 tensor. Both sides compute in float32 with
#: TF32 off and differ in the order of their sums.
FLOAT32 = 1e-4
#: The same for gradients and what is made of them: sums over more terms, of both signs.
FLOAT32_GRADIENT = 5e-4
#: bfloat16 on the device against float32 on the CPU: 8 bits of mantissa, through four layers.
BFLOAT16 = 5e-2
BFLOAT16_GRADIENT = 1.5e-1


def device_name() -> str:
    """The tier's device: "cuda", or "cpu" where :data:`DEVICE_VARIABLE` asks for a trial of the tests themselves.

    Raises:
        pytest.UsageError: for another word, or where there is no CUDA device.
    """
    name = os.environ.get(DEVICE_VARIABLE, "cuda")
    if name not in ("cuda", "cpu"):
        raise pytest.UsageError(f"{DEVICE_VARIABLE}={name}: must be cuda or cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(
            "the GPU tier: torch sees no CUDA device. Run it on a machine with a GPU, or try the tests themselves on "
            f"the CPU with {DEVICE_VARIABLE}=cpu"
        )
    return name


def environment(device: str, spec: str = "local") -> dict[str, str]:
    """Variables of a process on ``device`` whose layers are ``spec``'s. No rank of a launcher is inherited."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    keep = {name: value for name, value in os.environ.items() if name not in ranks and not name.startswith("SLURM_")}
    if device == "cpu":
        keep["CUDA_VISIBLE_DEVICES"] = ""
    return keep | {
        SPEC_VARIABLE: spec,
        "NVIDIA_TF32_OVERRIDE": "0",  # NVIDIA's containers switch TF32 on
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # what Megatron demands for tensor parallelism
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
    }


@contextmanager
def one_process(device: str) -> Iterator[Any]:
    """In this process: the stack made ready for the device, and groups of one."""
    from nemo_minitron.runtime import cpu
    from nemo_minitron.runtime.groups import ParallelLayout, destroy, initialize

    cpu.prepare(device)
    try:
        yield initialize(ParallelLayout())
    finally:
        destroy()
        cpu.deactivate()


def run_cases(
    folder: Path,
    function: str,
    *,
    device: str,
    spec: str = "local",
    world: int = 1,
    timeout: float = 240.0,
    settings: Mapping[str, Any] | None = None,
) -> list[Any]:
    """Call a function of :mod:`support.tier_cases` in processes of their own, one for each rank.

    A fault of a CUDA kernel leaves its process unusable; the tests that come after it are not to notice.

    Args:
        folder: where the results and the logs go.
        function: its name; called as ``function(groups, **settings)``, returns what ``torch.save`` can write.
        device: "cuda" or "cpu".
        spec: "local" or "transformer_engine".
        world: tensor-parallel processes.
        timeout: in seconds.
        settings: JSON values.

    Returns:
        What each rank returned.

    Raises:
        AssertionError: a process failed or the time ran out; the message holds the end of every log.
    """
    out = folder / f"{function}-{device}-{spec}-{world}-{time.monotonic_ns()}"
    out.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(world):
        variables = environment(device, spec)
        if world > 1:
            variables |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }  # fmt: skip
        command = [sys.executable, "-m", "support.tier_cases", function, device, str(world), str(out), str(rank)]
        with (out / f"rank{rank}.log").open("wb") as log:
            ranks.append(
                subprocess.Popen(
                    [*command, json.dumps(dict(settings or {}))], env=variables, stdout=log, stderr=log, cwd=out
                )
            )
    deadline = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
            if any(process.poll() not in (None, 0) for process in ranks):
                time.sleep(3)  # the others may end by themselves
                break
            time.sleep(0.1)
    finally:
        codes = [process.poll() for process in ranks]
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()
    if any(code != 0 for code in codes):
        logs = "\n".join(
            f"--- rank {rank} (exit {codes[rank]})\n{tail(out / f'rank{rank}.log')}" for rank in range(world)
        )
        raise AssertionError(f"{function} on {device} ({spec} layers, {world} processes) failed\n{logs}")
    return [torch.load(out / f"result{rank}.pt", weights_only=True) for rank in range(world)]


def tail(path: Path, lines: int = 40) -> str:
    """The last lines of a log."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str) -> None:
    """Assert that no entry differs by more than ``tolerance`` times the largest expected one."""
    assert found.shape == expected.shape, f"{name}: {list(found.shape)}, not {list(expected.shape)}"
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    assert bool(torch.isfinite(found).all()), f"{name}: NaN or infinite"
    if not expected.numel():
        return
    scale = max(float(expected.abs().max()), 1e-12)
    worst = float((found - expected).abs().max()) / scale
    assert worst <= tolerance, f"{name}: differs by {worst:.2e} of the largest entry, more than {tolerance:.0e}"


def missing(*modules: str) -> str:
    """Why something cannot run here: the modules that are not installed; "" where all are."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed here: {', '.join(absent)} (tests/gpu/README.md says what needs it)" if absent else ""


def layer_specs(device: str) -> list[Any]:
    """The layer specifications that this device can have, as parameters of a test."""
    if device == "cpu":  # Transformer Engine is for CUDA alone
        return ["local"]
    absent = missing("transformer_engine")
    return ["local", pytest.param("transformer_engine", marks=pytest.mark.skipif(bool(absent), reason=absent))]
