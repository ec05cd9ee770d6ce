"""Where tensors lie on a machine with CUDA: a model and its losses on a device that is not the CPU.

There is no CUDA in an ordinary test. Torch's meta device stands for it: it holds no numbers, but an operation between
one of its tensors and one that was left behind on the CPU fails, as it would between CUDA and the CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_distributed
from support.meta import rank_of_world
from support.tier_cases import checkpoint_of, positions_of

from nemo_minitron.distillation.losses.table import LOGIT_LOSSES
from nemo_minitron.runtime import cpu
from nemo_minitron.runtime.cpu import torch_patches
from nemo_minitron.runtime.device import Device
from nemo_minitron.runtime.groups import ParallelLayout

META = torch.device("meta")


class _Meta(Device):
    """CUDA without Transformer Engine, whose tensors are the meta device's."""

    @property
    def torch(self) -> torch.device:
        return META


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with _meta_groups(monkeypatch) as found:
        yield found


@contextmanager
def _meta_groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    cpu.activate()
    monkeypatch.setattr(torch_patches, "CPU", META)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *args, **kwargs: self.to(META))
    try:
        with rank_of_world(ParallelLayout(), 0) as found:
            monkeypatch.setattr(torch.cuda, "current_device", lambda: META)
            yield dataclasses.replace(found, device=_Meta("cuda", 1, False))
    finally:
        monkeypatch.undo()
        cpu.deactivate()


@pytest.mark.slow
def test_nothing_of_a_dense_model_is_left_on_the_cpu(tmp_path: Path) -> None:
    """Parameters, the forward pass, the loss and its gradients.

    In a process of its own: once something has imported torch.compile's parts, the meta device computes in Python, and
    refuses numbers on the CPU that CUDA takes.
    """
    assert run_distributed(_dense_models, 1, tmp_path) == [6]


def _dense_models() -> int:
    count = 0
    with pytest.MonkeyPatch.context() as monkeypatch, _meta_groups(monkeypatch) as groups:
        for family in ("llama", "qwen3", "nemotron"):
            for dtype in (torch.float32, torch.bfloat16):
                _dense_model(groups, family, dtype)
                count += 1
    return count


def _dense_model(groups: Any, family: str, dtype: torch.dtype) -> None:
    from nemo_minitron.checkpoints import load_into
    from nemo_minitron.distillation.losses.vocabulary_parallel import vocabulary_parallel_cross_entropy
    from nemo_minitron.runtime.model import build_model

    checkpoint = checkpoint_of(family)
    (chunk,) = build_model(checkpoint.shape, checkpoint.architecture, groups, dtype=dtype)
    assert {(one.device.type, one.dtype) for one in chunk.parameters()} == {("meta", dtype)}
    load_into([chunk], checkpoint, groups)
    ids = torch.zeros(2, 32, dtype=torch.int64, device=META)
    logits = chunk(ids, positions_of(ids), None)
    vocabulary_parallel_cross_entropy(logits.contiguous(), ids, groups.tp, vocab_size=251).sum().backward()
    assert {one.grad.device.type for one in chunk.parameters()} == {"meta"}


def test_a_router_is_not_left_on_the_cpu(groups: Any) -> None:
    """How many tokens an expert gets is data, which the meta device has not: parameters alone."""
    from nemo_minitron.runtime.model import build_model

    checkpoint = checkpoint_of("mixtral")
    (chunk,) = build_model(checkpoint.shape, checkpoint.architecture, groups)
    assert {one.device.type for one in chunk.parameters()} == {"meta"}


@pytest.mark.parametrize("kind", list(LOGIT_LOSSES))
@pytest.mark.parametrize("label_weight", [0.0, 0.3])
def test_no_loss_mixes_devices(groups: Any, kind: str, label_weight: float) -> None:
    from nemo_minitron.config import LossConfig
    from nemo_minitron.distillation.losses.common import CommonTokens
    from nemo_minitron.distillation.losses.vocabulary_parallel import vocabulary_parallel_loss

    student = torch.empty(6, 2, 256, device=META, requires_grad=True)
    teacher, labels = torch.empty(6, 2, 256, device=META), torch.zeros(6, 2, dtype=torch.int64, device=META)
    loss = LossConfig(kind=kind, k=16, temperature=2.0, label_weight=label_weight)
    fewer = torch.empty(6, 2, 128, device=META)
    for logits, common in ((teacher, None), (fewer, CommonTokens(100, (7, 50)))):
        student.grad = None
        taken = vocabulary_parallel_loss(
            student, logits, groups.tp, vocab_size=251, loss=loss, labels=labels, common=common
        )
        taken.total.sum().backward()
        assert student.grad is not None
        assert student.grad.device.type == "meta"


def test_a_tensor_that_was_left_behind_is_noticed(groups: Any) -> None:
    """What makes the tests above tests."""
    from nemo_minitron.runtime.model import build_model

    checkpoint = checkpoint_of("llama")
    (chunk,) = build_model(checkpoint.shape, checkpoint.architecture, groups)
    norm = chunk.decoder.final_layernorm
    norm.weight = torch.nn.Parameter(torch.ones(checkpoint.shape.hidden_size))
    ids = torch.zeros(2, 32, dtype=torch.int64, device=META)
    with pytest.raises(RuntimeError, match="device"):
        chunk(ids, positions_of(ids), None)
