"""The choice of the next token: against transformers' warpers, by frequency, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_minitron.errors import ConfigError
from nemo_minitron.generation import Sampling, generate_tokens
from nemo_minitron.generation.sampling import check_sampling, choose, draws


def logits(rows: int = 4, size: int = 20) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(2)) * 2


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 1.3, "top_k": 8, "top_p": 0.6}]
)
def test_frequencies_are_those_of_transformers_warped_softmax(settings: dict[str, Any]) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    row = logits(1)
    sampling = Sampling(**settings)
    warped = TemperatureLogitsWarper(sampling.temperature)(None, row)
    if sampling.top_k is not None:
        warped = TopKLogitsWarper(sampling.top_k)(None, warped)
    if sampling.top_p < 1:
        warped = TopPLogitsWarper(sampling.top_p)(None, warped)
    expected = warped.double().softmax(-1)[0]
    count = 20_000
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tokens, logprobs = choose(row.expand(count, -1), sampling, drawn)
    observed = torch.bincount(tokens, minlength=20).double()
    assert torch.equal(observed > 0, (expected > 0) & (observed > 0))  # nothing outside
    kept = expected > 0
    statistic = float(((observed - count * expected)[kept] ** 2 / (count * expected[kept])).sum())
    freedom = int(kept.sum()) - 1
    # The 99.9 % point of chi-square by Wilson and Hilferty (1931).
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < bound
    assert torch.allclose(logprobs, row[0].double().log_softmax(-1)[tokens], atol=1e-12)


def test_a_draw_is_where_the_cumulated_probability_passes_it() -> None:
    row = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    drawn = torch.tensor([0.0, 0.0999, 0.11, 0.31, 0.59, 0.61, 0.9999], dtype=torch.float64)
    assert choose(row.expand(7, -1), Sampling(), drawn)[0].tolist() == [0, 0, 1, 2, 2, 3, 3]
    # By falling probability once there is a truncation: 3 holds 0.4 / 0.9, then 2, then 1.
    assert choose(row.expand(7, -1), Sampling(top_k=3), drawn)[0].tolist() == [3, 3, 3, 3, 2, 2, 1]


def test_ties_go_to_the_lowest_id() -> None:
    row = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0]])
    zero, half = torch.zeros(1, dtype=torch.float64), torch.full((1,), 0.6, dtype=torch.float64)
    assert choose(row, Sampling(greedy=True), zero)[0].tolist() == [1]
    assert choose(row, Sampling(top_k=2), half)[0].tolist() == [2]
    assert choose(row, Sampling(top_k=1), half)[0].tolist() == [1]
    assert choose(row, Sampling(top_p=0.01), half)[0].tolist() == [1]
    assert choose(row, Sampling(top_k=9), zero)[0].tolist() == [1]  # more than there are


def test_draws_follow_from_seed_and_request_alone() -> None:
    nine = draws(9, seed=1234, request=7)
    assert torch.equal(draws(4, seed=1234, request=7), nine[:4])
    assert not torch.equal(nine, draws(9, seed=1234, request=8))
    assert not torch.equal(nine, draws(9, seed=1, request=7))
    everything = torch.cat([draws(9, seed=1234, request=request) for request in range(500)])
    assert 0 <= float(everything.min()) < float(everything.max()) < 1
    assert float(everything.mean()) == pytest.approx(0.5, abs=0.02)


def test_damaged_logits_are_seen() -> None:
    row = torch.tensor([[1.0, float("nan"), 0.0]])
    for sampling in (Sampling(), Sampling(greedy=True), Sampling(top_k=2)):
        assert not torch.isfinite(choose(row, sampling, torch.zeros(1, dtype=torch.float64))[1]).any()


def test_settings_that_leave_nothing_are_refused_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        check_sampling(Sampling(max_new_tokens=0, temperature=0.0, top_k=-1, top_p=1.5), seed=-1)
    assert [fault.split(":")[0] for fault in error.value.faults] == [
        "sampling.max_new_tokens=0", "sampling.temperature=0.0", "sampling.top_k=-1", "sampling.top_p=1.5",
        "seed=-1",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="temperature=nan"):
        check_sampling(Sampling(temperature=float("nan")), seed=1)
    with pytest.raises(ConfigError, match="sampling.top_k=0"):
        generate_tokens([], None, [[1]], sampling=Sampling(top_k=0), ends=[], vocab_size=4)  # type: ignore[arg-type]
