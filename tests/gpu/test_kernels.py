"""Losses, sampling, aggregations, moves of rows and norms on the device, against plain torch on the CPU.

Tolerances are parts of the largest entry of what is expected (:mod:`support.tier`). The losses are held against the
papers' formulas in float64; inputs in bfloat16 are exact there too, so that the kernels' own error is seen.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from support.tier import FLOAT32, close

from nemo_minitron.config import LossConfig, Sampling
from nemo_minitron.distillation.losses import reference, states, triton_choice, vocabulary_parallel
from nemo_minitron.distillation.losses.table import LOGIT_LOSSES, STATE_LOSSES
from nemo_minitron.generation.sampling import choose, draws
from nemo_minitron.importance.aggregation import AGGREGATIONS, aggregation

pytestmark = pytest.mark.gpu

#: Values of a loss are sums in float32 whatever the logits are; a gradient is rounded to the logits' dtype.
GRADIENT = {torch.float32: FLOAT32, torch.bfloat16: 8e-3}
VOCAB, PADDED, TOKENS = 32_003, 32_128, 48


def random(*sizes: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """On the CPU, the same everywhere."""
    return scale * torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def leaf(tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
    """A copy that gathers gradients; on the CPU too it shares nothing."""
    return tensor.detach().clone().to(place).requires_grad_()


@pytest.fixture(scope="module")
def logits() -> dict[torch.dtype, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Student's and teacher's ``[s, b, V]`` on the CPU, and labels."""
    student, teacher = (random(TOKENS // 2, 2, PADDED, seed=seed, scale=3.0) for seed in (1, 2))
    labels = torch.randint(0, VOCAB, (TOKENS // 2, 2), generator=torch.Generator().manual_seed(3))
    return {dtype: (student.to(dtype), teacher.to(dtype), labels) for dtype in GRADIENT}


def expected(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, loss: LossConfig) -> Any:
    """Loss of each token and gradient of their sum, by the formulas in float64."""
    z, p = student[..., :VOCAB].double().requires_grad_(), teacher[..., :VOCAB].double()
    value = (1 - loss.label_weight) * LOGIT_LOSSES[loss.kind].expected(z, p, loss)
    value = value + loss.label_weight * reference.cross_entropy(z, labels)
    value.sum().backward()
    return value.detach(), torch.nn.functional.pad(z.grad, (0, PADDED - VOCAB))


@pytest.mark.parametrize("dtype", list(GRADIENT), ids=str)
@pytest.mark.parametrize("kind", list(LOGIT_LOSSES))
@pytest.mark.parametrize("label_weight", [0.0, 0.3])
def test_divergences(groups: Any, place: torch.device, logits: Any, dtype: Any, kind: str, label_weight: float) -> None:
    student, teacher, labels = logits[dtype]
    loss = LossConfig(kind=kind, temperature=1.5, beta=0.3, k=64, label_weight=label_weight)
    value, gradient = expected(student, teacher, labels, loss)
    for inplace in (False, True):
        z = leaf(student, place)
        given = z * 1 if inplace else z
        taken = vocabulary_parallel.vocabulary_parallel_loss(
            given, teacher.to(place), groups.tp, vocab_size=VOCAB, loss=loss, labels=labels.to(place), inplace=inplace
        )
        taken.total.sum().backward()
        assert taken.total.device.type == z.grad.device.type == place.type
        close(taken.total, value, FLOAT32, kind)
        close(z.grad, gradient, GRADIENT[dtype], f"gradient of {kind}")


@pytest.mark.parametrize("dtype", list(GRADIENT), ids=str)
@pytest.mark.parametrize("kind", list(LOGIT_LOSSES))
@pytest.mark.parametrize("label_weight", [0.0, 0.3])
def test_divergences_over_common_tokens(
    groups: Any, place: torch.device, logits: Any, dtype: Any, kind: str, label_weight: float
) -> None:
    """A teacher of fewer rows, and ids in the middle that are left out."""
    from nemo_minitron.distillation.losses.common import CommonTokens

    student, _, labels = logits[dtype]
    teacher = logits[torch.float32][1]  # without ties, of which another number of columns may choose another
    rows, left_out = VOCAB - 200, (17, 4_000, 31_000)
    kept = [token for token in range(rows) if token not in left_out]
    loss = LossConfig(kind=kind, temperature=1.5, beta=0.3, k=64, label_weight=label_weight)
    exact = student[..., :VOCAB].double().requires_grad_()
    value = (1 - label_weight) * LOGIT_LOSSES[kind].expected(exact[..., kept], teacher[..., kept].double(), loss)
    value = value + label_weight * reference.cross_entropy(exact, labels)
    value.sum().backward()
    z = leaf(student, place)
    taken = vocabulary_parallel.vocabulary_parallel_loss(
        z, teacher[..., : rows + 50].contiguous().to(place), groups.tp, vocab_size=VOCAB, loss=loss,
        labels=labels.to(place), common=CommonTokens(rows, left_out),
    )  # fmt: skip
    taken.total.sum().backward()
    close(taken.total, value.detach(), FLOAT32, kind)
    gradient = torch.nn.functional.pad(exact.grad, (0, PADDED - VOCAB))
    close(z.grad, gradient, GRADIENT[dtype], f"gradient of {kind}")


@pytest.mark.parametrize("dtype", list(GRADIENT), ids=str)
def test_forward_kl_goes_through_its_tokens_in_blocks(
    groups: Any, place: torch.device, logits: Any, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In many chunks and blocks as in one, and the top tokens of the teacher by themselves."""
    from nemo_minitron.distillation.losses import kernels

    student, teacher, labels = logits[dtype]
    for settings in (vocabulary_parallel.CHUNK_BYTES, kernels.BLOCK_BYTES):
        for kind in settings:
            monkeypatch.setitem(settings, kind, 5 * PADDED * 4)
    for kind in ("forward_kl", "top_k"):
        loss = LossConfig(kind=kind, k=8)
        value, gradient = expected(student, teacher, labels, loss)
        z, p = leaf(student, place), teacher.to(place)
        if kind == "top_k":
            p = vocabulary_parallel.vocabulary_parallel_top_k(p, groups.tp, vocab_size=VOCAB, k=8)
        taken = vocabulary_parallel.vocabulary_parallel_loss(z, p, groups.tp, vocab_size=VOCAB, loss=loss)
        taken.total.sum().backward()
        close(taken.total, value, FLOAT32, kind)
        close(z.grad, gradient, GRADIENT[dtype], f"gradient of {kind}")


@pytest.mark.parametrize("dtype", list(GRADIENT), ids=str)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_with_and_without_triton(
    groups: Any, place: torch.device, logits: Any, dtype: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA, where Triton is installed, its kernels must be in use; without them the numbers are the same."""
    student, teacher, labels = logits[dtype]
    value, gradient = expected(student, teacher, labels, LossConfig(kind, 1.5))
    if place.type == "cuda" and importlib.util.find_spec("triton") is not None:
        assert triton_choice.triton_kernels(torch.zeros(2, 8, device=place)) is not None
    for setting in ("", "0"):
        monkeypatch.setenv(triton_choice.TRITON_VARIABLE, setting)
        z = leaf(student, place)
        taken = vocabulary_parallel.vocabulary_parallel_loss(
            z, teacher.to(place), groups.tp, vocab_size=VOCAB, loss=LossConfig(kind, 1.5)
        )
        taken.total.sum().backward()
        close(taken.total, value, FLOAT32, f"{kind}, {setting!r}")
        close(z.grad, gradient, GRADIENT[dtype], f"gradient of {kind}, {setting!r}")


@pytest.mark.parametrize("dtype", list(GRADIENT), ids=str)
def test_cross_entropy(groups: Any, place: torch.device, logits: Any, dtype: Any) -> None:
    student, _, labels = logits[dtype]
    z = leaf(student, place)
    taken = vocabulary_parallel.vocabulary_parallel_cross_entropy(z, labels.to(place), groups.tp, vocab_size=VOCAB)
    taken.sum().backward()
    wide = student[..., :VOCAB].double().requires_grad_()
    value = reference.cross_entropy(wide, labels)
    value.sum().backward()
    close(taken, value, FLOAT32, "cross-entropy")
    close(z.grad[..., :VOCAB], wide.grad, GRADIENT[dtype], "gradient of the cross-entropy")
    assert not z.grad[..., VOCAB:].any()


@pytest.mark.parametrize("dtype", list(GRADIENT), ids=str)
def test_intermediate_losses(place: torch.device, dtype: Any) -> None:
    """Against the same formulas on the CPU in float64."""
    narrow, wide, matrix = random(8, 2, 48, seed=1), random(8, 2, 64, seed=2), random(64, 48, seed=3, scale=0.2)
    masked = torch.ones(1, 8, 8, dtype=torch.bool).triu(1)
    ours, theirs = ([random(2, 8, width, seed=seed) for seed in range(3)] for width in (48, 64))

    def run(where: torch.device, kind: torch.dtype) -> list[torch.Tensor]:
        def at(x: torch.Tensor) -> torch.Tensor:
            return x.to(dtype).clone().to(device=where, dtype=kind)

        student = at(narrow).requires_grad_()
        found = [loss.function(student, at(wide), at(matrix)) for loss in STATE_LOSSES.values()]
        projected = [at(x).requires_grad_() for x in ours]
        found.append(
            states.attention_relations(tuple(projected), tuple(map(at, theirs)), heads=4, masked=masked.to(where))
        )
        torch.autograd.backward([one.sum() for one in found])
        return [*found, student.grad, *(x.grad for x in projected)]

    tolerance = FLOAT32 if dtype is torch.float32 else 3e-2
    found, wanted = run(place, dtype), run(torch.device("cpu"), torch.float64)
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        close(one, other, tolerance, f"number {index}")


@pytest.mark.parametrize(
    "sampling",
    [Sampling(greedy=True), Sampling(temperature=0.7), Sampling(top_k=5), Sampling(top_p=0.8, top_k=50)],
    ids=["greedy", "all", "top_k", "top_p"],
)
def test_sampling_draws_the_same_tokens(place: torch.device, sampling: Sampling) -> None:
    """In float64 from the same logits and draws, equal ones among them: token by token as on the CPU."""
    rows = random(64, 503, scale=2.0)
    rows[:, 100] = rows[:, 200] = rows.amax(-1)
    drawn = torch.stack([draws(1, seed=1234, request=request)[0] for request in range(len(rows))])
    tokens, logprobs = choose(rows.to(place), sampling, drawn)
    wanted, expected_logprobs = choose(rows, sampling, drawn)
    assert tokens.device.type == place.type
    assert torch.equal(tokens.cpu(), wanted)
    close(logprobs, expected_logprobs, 1e-12, "log-probabilities")


@pytest.mark.parametrize("name", list(AGGREGATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_aggregations(place: torch.device, name: str, dtype: Any) -> None:
    """In two parts, as scoring sees tokens, against all at once in float64 on the CPU."""
    values = random(40, 3, 17).to(dtype)
    one = aggregation(name, "test")
    parts = [one.statistics(part.to(place), 0) for part in values.split(25)]
    found = one.finish(one.combine(*parts), 40)
    wanted = one.finish(one.statistics(values.double(), 0), 40)
    assert found.device.type == place.type
    close(found, wanted, FLOAT32, name)


def test_rows_move_without_a_change(groups: Any, place: torch.device) -> None:
    """Alone no row has another rank to go to; the order, and zeros for padding, are what is left."""
    from nemo_minitron.axes import Axis
    from nemo_minitron.pruning.row_moves import take_rows

    local = random(12, 5)
    keep = torch.tensor([3, 0, 7, -1, 11])
    found = take_rows(local.to(place), Axis.VOCAB, 0, keep.to(place), 12, groups.tp)
    wanted = torch.cat([local[[3, 0, 7]], torch.zeros(1, 5), local[11:]])
    assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms(groups: Any, place: torch.device, dtype: Any) -> None:
    """Of both kinds, as the layers have them: placed with the model, value and gradients."""
    from support.tier_cases import checkpoint_of

    from nemo_minitron.runtime.model import build_model

    for family, functional in (("llama", "rms_norm"), ("nemotron", "layer_norm")):
        checkpoint = checkpoint_of(family)
        (chunk,) = build_model(checkpoint.shape, checkpoint.architecture, groups, dtype=dtype)
        norm = chunk.decoder.final_layernorm
        weights = list(norm.parameters())
        assert {(w.device.type, w.dtype) for w in chunk.parameters()} == {(place.type, dtype)}
        with torch.no_grad():
            for seed, weight in enumerate(weights):
                weight.copy_(random(*weight.shape, seed=seed, scale=0.1))
        states = random(6, 2, checkpoint.shape.hidden_size, seed=9).to(dtype)
        given = leaf(states, place)
        found = norm(given)
        found.square().sum().backward()
        wide = states.double().requires_grad_()
        copies = [weight.detach().cpu().double() for weight in weights]
        if family == "nemotron":
            copies[0] = copies[0] + 1  # stored minus one
        wanted = getattr(torch.nn.functional, functional)(wide, wide.shape[-1:], *copies, eps=1e-5)
        wanted.square().sum().backward()
        tolerance = FLOAT32 if dtype is torch.float32 else 2e-2
        close(found, wanted, tolerance, functional)
        close(given.grad, wide.grad, tolerance, f"gradient of {functional}")
