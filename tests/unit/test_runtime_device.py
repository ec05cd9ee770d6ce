"""The decision on a device: made once, never asked of torch again, and held under either build of torch."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_minitron.errors import ConfigError
from nemo_minitron.runtime import cpu, device


@pytest.fixture(autouse=True)
def _undecided(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    was_active = cpu.is_active()
    cpu.deactivate()
    device.forget()
    yield
    cpu.deactivate()
    monkeypatch.undo()  # or the layer would keep what a test put in torch's place, as the original
    device.forget()
    if was_active:
        cpu.activate()


def test_only_one_module_asks_torch(repository: Path) -> None:
    question = re.compile(r"cuda\.(is_available|device_count)\(|is_nccl_available\(|accelerator\.is_available\(")
    asking = [
        path.relative_to(repository).as_posix()
        for folder in ("nemo_minitron", "recipes")
        for path in sorted((repository / folder).rglob("*.py"))
        if any(question.search(line.split("``")[0]) for line in path.read_text(encoding="utf-8").splitlines())
    ]
    assert asking == ["nemo_minitron/runtime/device.py"]


def test_decided_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.decide() == device.CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.here() == device.CPU
    with pytest.raises(ConfigError, match=r"runtime\.device=cuda: no CUDA device is visible"):
        device.decide("cuda")


def cuda(monkeypatch: pytest.MonkeyPatch, *, devices: int = 8, engine: bool = True) -> None:
    """A machine with GPUs, as far as torch is asked."""
    import importlib.util

    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: (engine or None) if name == "transformer_engine" else real(name)
    )
    monkeypatch.delenv(device.LAYER_SPEC_VARIABLE, raising=False)


def test_cuda_is_taken_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "3")
    here = device.decide()
    assert (here.type, here.count, here.transformer_engine) == ("cuda", 8, True)
    assert (here.backend, here.accelerator, str(here.torch)) == ("nccl", "gpu", "cuda:3")
    assert [here.per_node(world) for world in (1, 8, 16)] == [1, 8, 8]
    assert not cpu.needed("auto")
    with pytest.raises(ConfigError, match=r"runtime\.device=cpu: this process has begun on cuda"):
        cpu.activate()


def test_a_process_that_sees_one_device_takes_number_0(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch, devices=1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert str(device.decide().torch) == "cuda:0"


@pytest.mark.parametrize(("engine", "wanted", "taken"), [
    (True, None, True), (True, "local", False), (True, "transformer_engine", True), (False, None, False),
    (False, "local", False),
])  # fmt: skip
def test_the_layers_of_a_cuda_device(
    monkeypatch: pytest.MonkeyPatch, engine: bool, wanted: str | None, taken: bool
) -> None:
    cuda(monkeypatch, engine=engine)
    if wanted is not None:
        monkeypatch.setenv(device.LAYER_SPEC_VARIABLE, wanted)
    assert device.decide().transformer_engine is taken


@pytest.mark.parametrize(("wanted", "message"), [
    ("transformer_engine", "Transformer Engine is not installed"), ("te", "must be local or transformer_engine"),
])  # fmt: skip
def test_layers_that_cannot_be(monkeypatch: pytest.MonkeyPatch, wanted: str, message: str) -> None:
    cuda(monkeypatch, engine=False)
    monkeypatch.setenv(device.LAYER_SPEC_VARIABLE, wanted)
    with pytest.raises(ConfigError, match=message):
        device.decide()


def test_a_cuda_device_without_apex_and_transformer_engine_is_made_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch, engine=False)
    here = cpu.prepare()
    assert here.is_cuda
    assert not cpu.is_active()
    applied = cpu.layer._state["patches"].patches
    assert {patch.lacking for patch in applied} == {"apex", "transformer_engine"}
    assert not [patch for patch in applied if patch.module.startswith("torch")]
    cpu.deactivate()
    cuda(monkeypatch, engine=True)
    cpu.prepare()
    assert {patch.lacking for patch in cpu.layer._state["patches"].patches} == {"apex"}


def test_what_a_script_calls_first_switches_the_layer_on_but_on_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu.ensure() == device.CPU
    assert cpu.is_active()
    state = dict(cpu.layer._state)
    assert cpu.ensure() == cpu.ensure(device.CPU) == device.CPU
    assert cpu.layer._state == state
    cpu.deactivate()
    cuda(monkeypatch, engine=False)
    here = cpu.ensure()
    assert here.is_cuda
    assert not cpu.layer._state
    assert cpu.ensure(here) == here
    assert not cpu.layer._state
    with pytest.raises(ConfigError, match=r"runtime\.device=cpu: this process has begun on cuda"):
        cpu.ensure(device.CPU)


# torch's own checks, with CUDA compiled in and no device to be seen: what the ordinary wheel is on a laptop.
COMPILED_IN = """
import torch
torch.cuda._is_compiled = lambda: True
torch._C._cuda_getDeviceCount = torch._C._cuda_getCurrentRawStream = lambda *_: 0
torch.version.cuda = "13.0"
"""
LIGHTNING = "import lightning.fabric.accelerators.cuda, os; assert os.environ['PYTORCH_NVML_BASED_CUDA_CHECK'] == '1'\n"
LAYER = "from nemo_minitron.runtime import cpu, device; assert cpu.prepare().type == 'cpu'\n"
CHECK = """
assert not torch.cuda.is_available() and torch.cuda.device_count() == 1
assert device.here() == device.CPU and cpu.needed("auto")
from lightning.pytorch.accelerators import CUDAAccelerator
assert not CUDAAccelerator.is_available()
from nemo_minitron.runtime.groups import ParallelLayout, initialize
import torch.distributed as dist
groups = initialize(ParallelLayout())
assert dist.get_backend(groups.tp) == "gloo" and groups.device.type == "cpu"
cpu.deactivate()
assert not torch.cuda.is_available() and torch.cuda.device_count() == 0
print("held")
"""


@pytest.mark.parametrize("order", [LIGHTNING + LAYER, LAYER + LIGHTNING, LAYER], ids=["before", "after", "never"])
@pytest.mark.slow
def test_the_layer_holds_a_build_with_cuda_whatever_is_imported_when(order: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPILED_IN + order + CHECK], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("held")


def test_the_layer_holds_a_build_with_cuda() -> None:
    code = COMPILED_IN + "import os; os.environ['PYTORCH_NVML_BASED_CUDA_CHECK'] = '1'\n" + LAYER
    code += "assert not torch.cuda.is_available() and torch.cuda.device_count() == 1; print('held')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "held"


def test_packages_that_need_a_driver_are_not_imported_on_the_cpu(tmp_path: Path) -> None:
    for name in ("transformer_engine", "apex"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')\n")
    code = f"""
import sys, importlib.util
sys.path.insert(0, {str(tmp_path)!r})
from nemo_minitron.runtime import cpu
cpu.activate()
for name in ("transformer_engine", "apex"):
    try:
        __import__(name)
    except ImportError:
        assert importlib.util.find_spec(name) is None
        continue
    raise AssertionError(name)
cpu.deactivate()
try:
    import apex
except OSError:
    print("hidden")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "hidden", done.stderr[-2000:]


@pytest.mark.slow  # imports Megatron
def test_a_model_asks_for_what_its_device_has() -> None:
    code = """
from nemo_minitron.runtime import cpu
cpu.activate()
from nemo_minitron.runtime.device import CPU, Device
from nemo_minitron.runtime.groups import ParallelLayout
from nemo_minitron.runtime.model import shape_of, transformer_config
from nemo_minitron.architecture import Architecture
from nemo_minitron.shape import ModelShape
shape = ModelShape(num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2,
                   head_dim=8, vocab_size=96, tied_embeddings=False)
architecture = Architecture(family="llama", norm_epsilon=1e-5, rotary_base=10000.0, max_position_embeddings=64)
for device in (CPU, Device("cuda", 1), Device("cuda", 1, True)):
    config = transformer_config(shape, architecture, ParallelLayout(), device)
    print(config.use_cpu_initialization, config.bias_activation_fusion, config.persist_layer_norm,
          config.masked_softmax_fusion)
    assert shape_of(config, vocab_size=96) == shape
experts, routed = shape.replace(num_moe_experts=3, tied_embeddings=True), Architecture("mixtral", moe_router_topk=2)
config = transformer_config(experts, routed, ParallelLayout(), CPU)
config.ffn_hidden_size = 128  # of the dense layers that a mixture may have beside its experts
assert shape_of(config, vocab_size=96, tied_embeddings=True) == experts
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["True False False False", "False False False False", "False True True True"], (
        done.stderr[-2000:]
    )
