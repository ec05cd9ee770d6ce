"""Losses over the tokens that two vocabularies have in common, against the plain formula on these columns."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_minitron.config import LossConfig
from nemo_minitron.distillation.losses import kernels, reference, vocabulary_parallel
from nemo_minitron.distillation.losses.common import CommonTokens
from nemo_minitron.distillation.losses.kernels import Columns, TopTokens
from nemo_minitron.distillation.losses.table import LOGIT_LOSSES
from nemo_minitron.distillation.losses.vocabulary_parallel import vocabulary_parallel_loss


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@settings(max_examples=200, deadline=None)
@given(
    rows=st.tuples(st.integers(4, 30), st.integers(4, 30)),
    padding=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    left_out=st.sets(st.integers(0, 29), max_size=3),
    chunk=st.integers(1, 12),
    loss=st.builds(
        LossConfig,
        kind=st.sampled_from(list(LOGIT_LOSSES)),
        temperature=st.sampled_from([0.7, 1.0, 2.0]),
        beta=st.sampled_from([0.1, 0.5]),
        k=st.integers(1, 8),
        label_weight=st.sampled_from([0.0, 0.3]),
    ),
    labelled=st.booleans(),
    inplace=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_losses_are_over_the_common_tokens(
    group: dist.ProcessGroup,
    rows: tuple[int, int],
    padding: tuple[int, int],
    left_out: set[int],
    chunk: int,
    loss: LossConfig,
    labelled: bool,
    inplace: bool,
    seed: int,
) -> None:
    """Value and gradient in float64: both softmaxes over the common columns, labels over all of the student's."""
    tokens, size = 6, min(rows)
    left_out = {token for token in left_out if token < size}
    kept = [token for token in range(size) if token not in left_out]
    labelled = labelled or loss.label_weight > 0
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        3 * torch.randn(tokens, count + more, generator=generator, dtype=torch.float64)
        for count, more in zip(rows, padding, strict=True)
    )
    labels = torch.randint(rows[0], (tokens,), generator=generator)
    plain = student[:, : rows[0]].clone().requires_grad_()
    divergence = LOGIT_LOSSES[loss.kind].expected(plain[:, kept], teacher[:, kept], loss)
    total = (1 - loss.label_weight) * divergence + loss.label_weight * reference.cross_entropy(plain, labels)
    total.sum().backward()

    leaf, untouched = student.clone().requires_grad_(), teacher.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vocabulary_parallel.CHUNK_BYTES, "cpu", chunk * student.shape[1] * 8)
        patch.setitem(kernels.BLOCK_BYTES, "cpu", max(1, chunk // 2) * student.shape[1] * 8)
        result = vocabulary_parallel_loss(
            leaf * 1, teacher, group, vocab_size=rows[0], loss=loss, labels=labels if labelled else None,
            inplace=inplace, common=CommonTokens(size, tuple(sorted(left_out))),
        )  # fmt: skip
        result.total.sum().backward()
    torch.testing.assert_close(result.divergence, divergence, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(result.total, total, rtol=1e-10, atol=1e-11)
    assert leaf.grad is not None and plain.grad is not None
    torch.testing.assert_close(leaf.grad[:, : rows[0]], plain.grad, rtol=1e-10, atol=1e-11)
    assert not leaf.grad[:, rows[0] :].any()
    assert torch.equal(teacher, untouched)


@pytest.mark.parametrize("kind", list(LOGIT_LOSSES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1e-3, 1.0, 50.0])
def test_tokens_left_out_stay_finite(
    group: dist.ProcessGroup, kind: str, dtype: torch.dtype, temperature: float
) -> None:
    """Even where they are the only likely ones, and beside an infinite logit of theirs; at any temperature."""
    student, teacher = (
        torch.tensor([[9.0, 3e38, -2.0, 1.0, 0.0], [1.0, 5.0, 2.0, 3.0, 0.5]]).to(dtype) for _ in range(2)
    )
    teacher[0, 1] = float("inf")
    teacher[:, 2] -= 1.0
    leaf, loss = student.clone().requires_grad_(), LossConfig(kind, temperature=temperature, k=2)
    common = CommonTokens(5, (1,))
    result = vocabulary_parallel_loss(leaf, teacher, group, vocab_size=5, loss=loss, common=common)
    result.total.sum().backward()
    kept = [0, 2, 3, 4]
    exact = student[:, kept].double().requires_grad_()
    expected = LOGIT_LOSSES[kind].expected(exact, teacher[:, kept].double(), loss)
    expected.sum().backward()
    torch.testing.assert_close(result.total.double(), expected, rtol=1e-5, atol=1e-5 * temperature**2)
    assert leaf.grad is not None and exact.grad is not None
    assert not leaf.grad[:, 1].any()
    torch.testing.assert_close(
        leaf.grad[:, kept].double(), exact.grad, rtol=1e-5 if dtype == torch.float32 else 2**-8, atol=1e-5 * temperature
    )


@pytest.mark.parametrize("kind", list(LOGIT_LOSSES))
def test_a_whole_vocabulary_is_what_it_was(group: dist.ProcessGroup, kind: str) -> None:
    """Bit for bit, and by the same calls."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(7, 32, generator=generator) for _ in range(2))
    results = []
    for common in (None, CommonTokens(30)):
        leaf = student.clone().requires_grad_()
        result = vocabulary_parallel_loss(
            leaf, teacher, group, vocab_size=30, loss=LossConfig(kind, k=3), common=common
        )
        result.total.sum().backward()
        results.append((result.total, leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@settings(max_examples=60, deadline=None)
@given(
    absent=st.lists(st.booleans(), min_size=12, max_size=12),
    seed=st.integers(0, 100),
    labelled=st.booleans(),
    left_out=st.sets(st.integers(0, 9), max_size=2),
)
def test_likeliest_tokens_of_which_some_are_missing(
    group: dist.ProcessGroup, absent: list[bool], seed: int, labelled: bool, left_out: set[int]
) -> None:
    """The missing ones have no probability: the loss is over the others and one ghost, gradient included."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(4, 10, generator=generator, dtype=torch.float64)
    log_p = (2 * torch.randn(4, 10, generator=generator, dtype=torch.float64)).log_softmax(-1)
    log_p[:, sorted(left_out)] = -torch.inf
    best = log_p.topk(3, -1)
    gone = torch.tensor(absent).view(4, 3)
    values = best.values.masked_fill(gone, -torch.inf)
    rest = log_p.scatter(-1, best.indices, -torch.inf).logsumexp(-1)
    norm = torch.logaddexp(values.logsumexp(-1), rest)
    top = TopTokens(best.indices.masked_fill(gone, -1), values - norm[:, None], rest - norm, full=False)

    leaf, plain = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss, common = LossConfig("top_k", k=3), CommonTokens(10, tuple(sorted(left_out)))
    labels = torch.zeros(4, dtype=torch.int64) if labelled else None
    result = vocabulary_parallel_loss(
        leaf * 1, top, group, vocab_size=10, loss=loss, labels=labels, common=common, inplace=True
    )
    result.divergence.sum()
    result.total.sum().backward()
    part = torch.ones(10, dtype=torch.bool)
    part[sorted(left_out)] = False
    log_q = plain.masked_fill(~part, -torch.inf).log_softmax(-1)
    expected = []
    for row in range(4):
        tokens = best.indices[row][~gone[row]]
        other = part.clone()
        other[tokens] = False
        q = torch.cat([log_q[row, tokens], log_q[row, other].logsumexp(-1, keepdim=True)])
        p = torch.cat([top.log_probabilities[row][~gone[row]], top.log_rest[row : row + 1]])
        expected.append((p.exp() * (p - q)).sum())
    torch.stack(expected).sum().backward()
    torch.testing.assert_close(result.total, torch.stack(expected), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(leaf.grad, plain.grad, rtol=1e-10, atol=1e-11)


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 40), rows=st.integers(1, 40), world=st.integers(1, 4), left_out=st.sets(st.integers(0, 39)))
def test_every_rank_leaves_out_its_own_columns(size: int, rows: int, world: int, left_out: set[int]) -> None:
    common = CommonTokens(size, tuple(sorted(token for token in left_out if token < size)))
    held = -(-rows // world)
    outside = set()
    for rank in range(world):
        first = rank * held
        columns = Columns(None, first, min(max(rows - first, 0), held))  # type: ignore[arg-type]
        mine = common.outside(columns)
        assert len(mine) == len(set(mine)) and all(0 <= column < columns.valid for column in mine)
        outside |= {first + column for column in mine}
    assert outside == {token for token in range(rows) if token >= size or token in common.left_out}
    assert len(common) == size - len(common.left_out)
