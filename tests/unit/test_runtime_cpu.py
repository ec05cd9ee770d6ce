"""The CPU layer on torch alone: what it changes, and that it leaves no trace."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.errors import ConfigError
from nemo_minitron.runtime import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the layer is for machines without CUDA")


@pytest.fixture(autouse=True)
def _switched_off() -> Iterator[None]:
    """Start with the layer off, and leave it as it was found."""
    was_active = cpu.is_active()
    cpu.deactivate()
    yield
    cpu.deactivate()
    if was_active:
        cpu.activate()


@pytest.fixture
def layer(_switched_off: None) -> None:
    cpu.activate()


def held(module: Any, attribute: str) -> Any:
    """What the owner of ``module.attribute`` itself holds under that name; its class's or base's does not count."""
    *path, name = attribute.split(".")
    return vars(reduce(getattr, path, module)).get(name)


def test_activation_and_deactivation_leave_torch_as_it_was() -> None:
    ours = [patch for patch in cpu.patches() if patch.module.split(".")[0] == "torch"]
    assert len(ours) > 40
    before = [held(sys.modules[patch.module], patch.attribute) for patch in ours]
    environment = dict(os.environ)
    for _ in range(2):
        cpu.activate()
        assert cpu.is_active()
        for patch, original in zip(ours, before, strict=True):
            assert held(sys.modules[patch.module], patch.attribute) is not original, patch.attribute
        cpu.deactivate()
        assert not cpu.is_active()
        for patch, original in zip(ours, before, strict=True):
            assert held(sys.modules[patch.module], patch.attribute) is original, patch.attribute
    assert dict(os.environ) == environment
    with pytest.raises((AssertionError, RuntimeError), match="CUDA|NVIDIA"):
        torch.zeros(1, device="cuda")


def test_copies_of_functions_call_the_original_after_deactivation() -> None:
    cpu.activate()
    from torch.cuda import current_device, synchronize

    assert current_device() == 0
    synchronize()
    cpu.deactivate()
    with pytest.raises((AssertionError, RuntimeError), match="CUDA|NVIDIA"):
        current_device()


@pytest.mark.usefixtures("layer")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0), 0])
def test_a_cuda_device_means_the_cpu(device: Any) -> None:
    made = [
        torch.zeros(2, device=device),
        torch.tensor([1.0], device=device),
        torch.randn(2, 2, device=device),
        torch.as_tensor([1], device=device),
        torch.ones(3).new_zeros(3, device=device),
        torch.ones(3).to(device),
        torch.ones(3).to(device=device),
        torch.ones(3).to(device, torch.float64),
        torch.ones(3).cuda(),
        torch.nn.Linear(2, 2).to(device).weight,
        torch.nn.Linear(2, 2).cuda().weight,
        torch.cuda.FloatTensor([1.0]),
        torch.arange(3, device=torch.cuda.current_device()),
    ]
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert made[7].dtype == torch.float64


class Scaled(torch.autograd.Function):
    """Doubles; both passes write the device out as Megatron does."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value * torch.tensor(2.0, device="cuda")

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.full((1,), 2.0, device=torch.device("cuda"))


class Model(torch.nn.Module):
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return Scaled.apply(value + torch.zeros(3, device="cuda"))


@pytest.mark.usefixtures("layer")
def test_device_literals_in_forward_and_backward() -> None:
    value = torch.ones(3, requires_grad=True)
    Model()(value).sum().backward()
    torch.autograd.backward(Model()(value).sum())
    Model()(value).backward(gradient=torch.ones(3))
    Model()(value).backward(torch.ones(3), retain_graph=True, inputs=[value])
    assert value.grad is not None
    assert value.grad.tolist() == [8.0] * 3
    (gradient,) = torch.autograd.grad(Model()(value).sum(), value)
    assert gradient.tolist() == [2.0] * 3
    # The mode is still on after a backward pass.
    assert torch.zeros(1, device="cuda").device.type == "cpu"


@pytest.mark.usefixtures("layer")
def test_the_cuda_generator_is_the_cpu_generator() -> None:
    torch.cuda.manual_seed(11)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)
    torch.manual_seed(11)
    assert torch.equal(torch.rand(4), first)
    assert torch.cuda.initial_seed() == 11


@pytest.mark.usefixtures("layer")
def test_what_megatron_asks_of_a_device() -> None:
    assert torch.cuda.device_count() == 1
    assert not torch.cuda.is_available(), "that there is no CUDA is not hidden from who asks"
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).type("torch.cuda.LongTensor").dtype == torch.int64
    assert isinstance(torch.ones(1), torch.cuda.FloatTensor)
    assert not isinstance(torch.ones(1), torch.cuda.LongTensor)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    end.record()
    assert start.elapsed_time(end) == 0.0
    assert torch.cuda.memory_allocated() == 0


def test_which_devices_need_the_layer() -> None:
    assert cpu.needed("auto")
    assert cpu.needed("cpu")
    with pytest.raises(ConfigError, match="runtime.device=cuda: no CUDA device is visible"):
        cpu.needed("cuda")
    with pytest.raises(ConfigError, match="runtime.device='gpu': must be auto, cpu or cuda"):
        cpu.needed("gpu")


def test_every_patch_stands_in_the_documentation(repository: Path) -> None:
    table = cpu.markdown()
    for patch in cpu.patches():
        assert f"`{patch.attribute}`" in table
        assert len(patch.why) > 10
    text = (repository / "docs" / "runtime.md").read_text(encoding="utf-8")
    assert table in text, "docs/runtime.md is behind: put in the output of python -m nemo_minitron.runtime.cpu"


WHOLE_STACK = """
import importlib, inspect, os
from functools import reduce
from nemo_minitron.runtime import cpu; from nemo_minitron.runtime.cpu import quiet
from nemo_minitron.runtime.cpu.patching import PatchSet
quiet.quiet()
patches = PatchSet(cpu.patches()).patches  # those for the installed versions
modules = {name: importlib.import_module(name) for name in dict.fromkeys(patch.module for patch in patches)}
missing = object()
def held(patch):
    *path, name = patch.attribute.split(".")
    return vars(reduce(getattr, path, modules[patch.module])).get(name, missing)
for patch in patches:
    *path, name = patch.attribute.split(".")
    owner = reduce(getattr, path, modules[patch.module])
    exists = inspect.getattr_static(owner, name, missing) is not missing
    assert exists != patch.optional, f"{patch.module}.{patch.attribute} exists: {exists}, optional: {patch.optional}"
before = [held(patch) for patch in patches]
environment = dict(os.environ)
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
import torch
for _ in range(2):
    cpu.activate()
    for patch, original in zip(patches, before):
        assert held(patch) is not original, (patch.module, patch.attribute)
    tracker = CudaRNGStatesTracker()
    tracker.add("a", 3)
    state = torch.get_rng_state()
    with tracker.fork("a"):
        first = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4), first)
    from lightning.pytorch.accelerators import CUDAAccelerator
    assert not CUDAAccelerator.is_available()
    cpu.deactivate()
    for patch, original in zip(patches, before):
        assert held(patch) is original, (patch.module, patch.attribute)
assert dict(os.environ) == environment
print("whole stack as it was")
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_every_patch_names_something_and_leaves_the_whole_stack_as_it_was() -> None:
    done = run(WHOLE_STACK)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "whole stack as it was" in done.stdout


@pytest.mark.slow
def test_imports_are_silent() -> None:
    done = run(
        "from nemo_minitron.runtime import cpu; cpu.activate()\n"
        "import nemo.collections.llm, nemo_aligner.models.nlp.gpt.gpt_sft_model, nemo_aligner.algorithms.supervised"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout + done.stderr == ""


def test_the_command_prints_the_table() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nemo_minitron.runtime.cpu"], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == cpu.markdown()
    assert done.stderr == ""


def test_patch_factories_take_the_original() -> None:
    for patch in cpu.patches():
        assert len(inspect.signature(patch.make).parameters) == 1, patch.attribute
