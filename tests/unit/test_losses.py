"""The reference losses against first principles, and the vocabulary-parallel form in one process."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_minitron.distillation import vocabulary_parallel
from nemo_minitron.distillation.losses import forward_kl
from nemo_minitron.distillation.vocabulary_parallel import vocabulary_parallel_forward_kl


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = dist.TCPStore("127.0.0.1", port, 1, is_master=True)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()
    os.environ.pop("RANK", None)


def logits(tokens: int, vocab: int, seed: int, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, tokens, vocab, generator=generator, dtype=torch.float64)
    return student, teacher


def test_forward_kl_is_the_textbook_sum() -> None:
    student, teacher = logits(5, 7, 0)
    for temperature in (0.5, 1.0, 3.0):
        p, q = (torch.softmax(x / temperature, -1) for x in (teacher, student))
        expected = temperature**2 * (p * (p / q).log()).sum(-1)
        torch.testing.assert_close(forward_kl(student, teacher, temperature=temperature), expected, rtol=1e-12, atol=0)


def test_forward_kl_is_zero_for_equals_and_its_gradient_is_student_minus_teacher() -> None:
    student, teacher = logits(4, 9, 1)
    assert forward_kl(teacher, teacher).abs().max() < 1e-14
    student.requires_grad_()
    forward_kl(student, teacher).sum().backward()
    torch.testing.assert_close(student.grad, torch.softmax(student, -1).detach() - torch.softmax(teacher, -1))


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = logits(2, 5, 2)
    student.requires_grad_()
    teacher.requires_grad_()
    forward_kl(student, teacher).sum().backward()
    assert teacher.grad is None


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 9),
    vocab=st.integers(1, 40),
    padding=st.integers(0, 8),
    chunk=st.integers(1, 12),
    temperature=st.sampled_from([0.7, 1.0, 2.0]),
    inplace=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_chunked_form_equals_the_reference(
    group: dist.ProcessGroup,
    tokens: int,
    vocab: int,
    padding: int,
    chunk: int,
    temperature: float,
    inplace: bool,
    seed: int,
) -> None:
    student, teacher = logits(tokens, vocab + padding, seed, scale=10.0)
    weights = torch.rand(tokens, dtype=torch.float64)
    reference = student[:, :vocab].clone().requires_grad_()
    expected = forward_kl(reference, teacher[:, :vocab], temperature=temperature)
    (expected * weights).sum().backward()

    leaf = student.clone().requires_grad_()
    vocabulary_parallel.CHUNK_BYTES, saved = chunk * vocab * 8, vocabulary_parallel.CHUNK_BYTES
    try:
        # In place only a computed tensor may be overwritten, as a leaf's value would be lost.
        loss = vocabulary_parallel_forward_kl(
            leaf * 1, teacher, group, vocab_size=vocab, temperature=temperature, inplace=inplace
        )
        (loss * weights).sum().backward()
    finally:
        vocabulary_parallel.CHUNK_BYTES = saved
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad[:, :vocab], reference.grad, rtol=1e-10, atol=1e-12)
    assert not leaf.grad[:, vocab:].any()


def test_extreme_logits_stay_finite(group: dist.ProcessGroup) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0]], dtype=torch.float32, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0]], dtype=torch.float32)
    loss = vocabulary_parallel_forward_kl(student, teacher, group, vocab_size=3)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([2e4]))
    assert student.grad is not None and torch.isfinite(student.grad).all()


def test_low_precision_logits_are_summed_in_float32(group: dist.ProcessGroup) -> None:
    student, teacher = (x.to(torch.bfloat16) for x in logits(16, 500, 3))
    leaf = student.clone().requires_grad_()
    loss = vocabulary_parallel_forward_kl(leaf, teacher, group, vocab_size=500)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), forward_kl(student.double(), teacher.double()), rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == torch.bfloat16


def test_different_shapes_are_refused(group: dist.ProcessGroup) -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        vocabulary_parallel_forward_kl(torch.zeros(2, 3), torch.zeros(2, 4), group, vocab_size=3)
