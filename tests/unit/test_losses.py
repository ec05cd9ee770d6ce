"""The reference losses against first principles, and the vocabulary-parallel form in one process."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_minitron.config import LossConfig
from nemo_minitron.distillation.losses import kernels, reference, vocabulary_parallel
from nemo_minitron.distillation.losses.reference import forward_kl
from nemo_minitron.distillation.losses.table import LOGIT_LOSSES
from nemo_minitron.distillation.losses.vocabulary_parallel import (
    vocabulary_parallel_cross_entropy,
    vocabulary_parallel_forward_kl,
    vocabulary_parallel_loss,
    vocabulary_parallel_top_k,
)


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


def expected_loss(loss: LossConfig, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return LOGIT_LOSSES[loss.kind].expected(student, teacher, loss)


@settings(max_examples=120, deadline=None)
@given(
    tokens=st.integers(1, 9),
    vocab=st.integers(1, 40),
    padding=st.integers(0, 8),
    chunk=st.integers(1, 12),
    loss=st.builds(
        LossConfig,
        kind=st.sampled_from(list(LOGIT_LOSSES)),
        temperature=st.sampled_from([0.7, 1.0, 2.0]),
        beta=st.sampled_from([0.1, 0.5, 0.8]),
        k=st.integers(1, 12),
        label_weight=st.sampled_from([0.0, 0.3]),
    ),
    labelled=st.booleans(),
    inplace=st.booleans(),
    scale=st.sampled_from([1.0, 10.0]),
    seed=st.integers(0, 1000),
)
def test_chunked_form_equals_the_reference(
    group: dist.ProcessGroup,
    tokens: int,
    vocab: int,
    padding: int,
    chunk: int,
    loss: LossConfig,
    labelled: bool,
    inplace: bool,
    scale: float,
    seed: int,
) -> None:
    labelled = labelled or loss.label_weight > 0
    student, teacher = logits(tokens, vocab + padding, seed, scale=scale)
    weights = torch.rand(tokens, dtype=torch.float64)
    labels = torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(seed))
    plain = student[:, :vocab].clone().requires_grad_()
    divergence = expected_loss(loss, plain, teacher[:, :vocab])
    cross_entropy = reference.cross_entropy(plain, labels)
    total = (1 - loss.label_weight) * divergence + loss.label_weight * cross_entropy
    (total * weights).sum().backward()

    leaf = student.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vocabulary_parallel.CHUNK_BYTES, "cpu", chunk * (vocab + padding) * 8)
        patch.setitem(kernels.BLOCK_BYTES, "cpu", max(1, chunk // 2) * vocab * 8)
        # In place only a computed tensor may be overwritten, as a leaf's value would be lost.
        found = vocabulary_parallel_loss(
            leaf * 1, teacher, group, vocab_size=vocab, loss=loss, labels=labels if labelled else None, inplace=inplace
        )
        (found.total * weights).sum().backward()
    torch.testing.assert_close(found.divergence, divergence, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(found.total, total, rtol=1e-10, atol=1e-11)
    assert not found.divergence.requires_grad
    assert (found.cross_entropy is not None) == labelled
    if found.cross_entropy is not None:
        torch.testing.assert_close(found.cross_entropy, cross_entropy, rtol=1e-10, atol=1e-11)
        assert not found.cross_entropy.requires_grad
    assert leaf.grad is not None and plain.grad is not None
    torch.testing.assert_close(leaf.grad[:, :vocab], plain.grad, rtol=1e-10, atol=1e-11)
    assert not leaf.grad[:, vocab:].any()


@settings(max_examples=30, deadline=None)
@given(vocab=st.integers(2, 30), seed=st.integers(0, 1000), temperature=st.sampled_from([0.5, 1.0, 3.0]))
def test_a_top_k_teacher_is_as_good_as_its_logits(
    group: dist.ProcessGroup, vocab: int, seed: int, temperature: float
) -> None:
    student, teacher = logits(6, vocab, seed)
    k = 1 + seed % (vocab - 1)
    top = vocabulary_parallel_top_k(teacher, group, vocab_size=vocab, k=k, temperature=temperature)
    mass = top.log_probabilities.exp().sum(-1) + top.log_rest.exp()
    torch.testing.assert_close(mass, torch.ones(6, dtype=torch.float64))
    loss = LossConfig("top_k", k=k, temperature=temperature)
    for given_teacher in (top, teacher):
        leaf = student.clone().requires_grad_()
        found = vocabulary_parallel_loss(leaf, given_teacher, group, vocab_size=vocab, loss=loss)
        found.total.sum().backward()
        expected = reference.top_k_kl(student, teacher, k=k, temperature=temperature)
        torch.testing.assert_close(found.total, expected, rtol=1e-10, atol=1e-11)
        if given_teacher is top:
            first = leaf.grad
        else:
            torch.testing.assert_close(leaf.grad, first)


def test_divergences_are_ordered_as_theory_says() -> None:
    """Data processing: coarser outcomes diverge less; k grows, the loss grows, and ends at the forward KL."""
    student, teacher = logits(8, 20, 5)
    previous = torch.zeros(8, dtype=torch.float64)
    for k in range(1, 21):
        loss = reference.top_k_kl(student, teacher, k=k)
        assert (loss >= previous - 1e-12).all()
        previous = loss
    torch.testing.assert_close(previous, forward_kl(student, teacher))
    # Limits of Jensen-Shannon, and its symmetry
    small = 1e-6
    torch.testing.assert_close(
        reference.jensen_shannon(student, teacher, beta=small) / small, forward_kl(student, teacher), rtol=5e-3, atol=0
    )
    torch.testing.assert_close(
        reference.jensen_shannon(student, teacher, beta=1 - small) / small,
        reference.reverse_kl(student, teacher), rtol=5e-3, atol=0,
    )  # fmt: skip
    torch.testing.assert_close(
        reference.jensen_shannon(student, teacher, beta=0.3), reference.jensen_shannon(teacher, student, beta=0.7)
    )
    torch.testing.assert_close(reference.reverse_kl(student, teacher), forward_kl(teacher, student))


@pytest.mark.parametrize("kind", list(LOGIT_LOSSES))
def test_certain_models_stay_finite_in_float32(group: dist.ProcessGroup, kind: str) -> None:
    """A teacher that is sure, a student that is sure of something else, and both sure of the same."""
    student = torch.tensor([[1e3, -1e3, 0.0, 5.0], [2e2, 0.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e3, 1e3, 0.0, 5.0], [3e2, 0.0, 0.0, 0.0]])
    loss = LossConfig(kind, k=2)
    found = vocabulary_parallel_loss(student, teacher, group, vocab_size=4, loss=loss)
    found.total.sum().backward()
    exact = expected_loss(loss, student.detach().double(), teacher.double())
    torch.testing.assert_close(found.total.detach().double(), exact, rtol=1e-6, atol=1e-6)
    assert student.grad is not None and torch.isfinite(student.grad).all()


def test_ignored_labels_are_finite_and_leave_a_plain_softmax(group: dist.ProcessGroup) -> None:
    student, _ = logits(3, 6, 0)
    ignored = torch.tensor([2, -100, 5])
    loss = vocabulary_parallel_cross_entropy(student, ignored, group, vocab_size=6)
    assert torch.isfinite(loss).all()
    torch.testing.assert_close(loss[[0, 2]], reference.cross_entropy(student[[0, 2]], ignored[[0, 2]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "mse"}, "kind=mse: must be one of forward_kl"),
        ({"temperature": 0.0}, "temperature=0.0: must be above 0"),
        ({"beta": 1.0}, "beta=1.0: must lie between"),
        ({"k": 0}, "k=0: must be above 0"),
        ({"label_weight": 1.5}, "label_weight=1.5"),
        ({"label_weight": 0.5}, "label_weight=0.5: needs labels"),
    ],
)
def test_impossible_losses_are_refused(group: dist.ProcessGroup, change: dict[str, Any], message: str) -> None:
    student, teacher = logits(2, 5, 2)
    with pytest.raises(ValueError, match=message):
        vocabulary_parallel_loss(student, teacher, group, vocab_size=5, loss=LossConfig(**change))


def test_a_top_k_teacher_serves_no_other_loss(group: dist.ProcessGroup) -> None:
    student, teacher = logits(4, 9, 1)
    top = vocabulary_parallel_top_k(teacher, group, vocab_size=9, k=3)
    with pytest.raises(ValueError, match="needs the teacher's logits"):
        vocabulary_parallel_loss(student, top, group, vocab_size=9, loss=LossConfig("forward_kl"))
    with pytest.raises(ValueError, match="4 positions, the student has 2"):
        vocabulary_parallel_loss(student[:2], top, group, vocab_size=9, loss=LossConfig("top_k"))


def test_extreme_logits_stay_finite(group: dist.ProcessGroup) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0]], dtype=torch.float32, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0]], dtype=torch.float32)
    loss = vocabulary_parallel_forward_kl(student, teacher, group, vocab_size=3)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([2e4]))
    assert student.grad is not None and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_low_precision_logits_are_summed_in_float32(
    group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch, temperature: float, inplace: bool
) -> None:
    """Their gradient is rounded once, when it is written."""
    monkeypatch.setitem(kernels.BLOCK_BYTES, "cpu", 3 * 500 * 4)
    student, teacher = (x.to(torch.bfloat16) for x in logits(16, 500, 3))
    leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    loss = vocabulary_parallel_forward_kl(
        leaf * 1, teacher, group, vocab_size=500, temperature=temperature, inplace=inplace
    )
    assert loss.dtype == torch.float32
    expected = forward_kl(exact, teacher.double(), temperature=temperature)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    expected.sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == torch.bfloat16 and exact.grad is not None
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=2**-8, atol=1e-7)


def test_without_a_gradient_only_the_loss_is_computed(group: dist.ProcessGroup) -> None:
    student, teacher = logits(5, 40, 4)
    kept = student.clone()
    loss = vocabulary_parallel_forward_kl(student, teacher, group, vocab_size=40)
    torch.testing.assert_close(loss, forward_kl(student, teacher), rtol=1e-12, atol=1e-12)
    assert torch.equal(student, kept) and not loss.requires_grad


def test_different_shapes_are_refused(group: dist.ProcessGroup) -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        vocabulary_parallel_forward_kl(torch.zeros(2, 3), torch.zeros(2, 4), group, vocab_size=3)
