"""The statistics of ``benchmarks/orders.py``: intervals of paired differences, and what they say of a claim."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the module sets it where it is not
    import orders

    return orders


@pytest.fixture(autouse=True)
def forgotten() -> Any:
    """Modules of the benchmarks have common names."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def test_an_interval_is_that_of_the_seeds_means_or_of_the_blocks(orders: ModuleType) -> None:
    # By hand: means 1, 2, 3; their standard error 1 / sqrt(3); t(0.975, 2) = 4.30265.
    centre, low, high = orders.interval([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    assert (centre, high - centre, centre - low) == pytest.approx((2.0, 4.302653 / 3**0.5, 4.302653 / 3**0.5), rel=1e-6)
    # Seeds that agree: what remains is the blocks' error, sqrt(2 * 0.5 / 2) / 2.
    centre, low, high = orders.interval([[0.5, 1.5], [0.5, 1.5]])
    assert (centre, high - centre) == pytest.approx((1.0, 12.706205 * 0.5**0.5 / 2), rel=1e-6)
    # One seed: its blocks alone, with their own degrees of freedom; one number says nothing of its error.
    centre, low, high = orders.interval([[1.0, 2.0, 3.0]])
    assert (centre, high - centre) == pytest.approx((2.0, 4.302653 / 3**0.5), rel=1e-6)
    assert orders.interval([[1.0]])[1:] == (-math.inf, math.inf)


def test_an_interval_covers_the_difference_as_often_as_it_says(orders: ModuleType) -> None:
    draws = np.random.default_rng(0)
    for between in (0.0, 1.0):
        covered = 0
        for _ in range(400):
            means = draws.normal(0.3, between, size=3)
            rows = draws.normal(means[:, None], 2.0, size=(3, 16)).tolist()
            _, low, high = orders.interval(rows)
            covered += low <= 0.3 <= high
        assert covered / 400 >= 0.93  # more is caution: the larger of two errors counts


def test_verdicts_and_pairs(orders: ModuleType) -> None:
    verdicts = [orders.verdict(*bounds) for bounds in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1), (-math.inf, math.inf))]
    assert verdicts == ["shows", "does not show", "cannot be told", "cannot be told"]
    assert orders.paired([[3.0, 4.0], None, [1.0]], [[1.0, 1.0], [1.0], [2.0]]) == [[2.0, 3.0], [-1.0]]
    with pytest.raises(ValueError, match="shorter"):
        orders.paired([[1.0, 2.0]], [[1.0]])


def test_the_stages_of_a_seed_are_pipelines(orders: ModuleType, tmp_path: Path) -> None:
    """What is trained is what is asked of, on the same cached logits; the candidates are of a size."""
    import yaml

    from nemo_minitron.config import load_pipeline

    arguments = SimpleNamespace(
        quick=False, output=tmp_path, steps=[40, 10, 160], seeds=2, samples=64, cache_dir="cache", held_out=4,
        questions=8, measured=[],
    )  # fmt: skip
    plan = orders.Plan(arguments)
    stages = [*plan.preparation(2), *plan.trainings(2)]
    (tmp_path / "all.yaml").write_text(yaml.safe_dump({"name": "orders", "output": "o", "stages": stages}))
    _, read = load_pipeline(tmp_path / "all.yaml")
    trained = [stage for stage in read if stage.STAGE == "distill"]
    assert [stage.name for stage in trained] == [f"{name}-2" for name in plan.names(2)]
    (cache,) = (stage for stage in read if stage.STAGE == "cache")
    assert cache.steps == 160
    assert {stage.teacher_cache for stage in trained if stage.loss.label_weight == 0} == {cache.output}
    assert [stage.name for stage in trained if stage.loss.label_weight == 1] == ["labels-160-2"]
    sizes = [
        28_311_552 + shape.get("num_layers", 30) * (884_736 + 3 * 576 * shape.get("ffn_hidden_size", 1536))
        for shape in orders.SHAPES.values()
    ]
    assert max(sizes) < 1.02 * min(sizes)

    measured = orders.Measured(plan, arguments)
    assert not measured.has_all(2) and not measured.take(2), "nothing has been trained"
    assert orders.claims(plan, measured) == {}
    for seed in plan.seeds:
        for number, name in enumerate(plan.names(seed)):
            measured.kept(f"{seed}/{name}/curve", lambda: [[5120, 4.0], [81920, 3.0]])
            measured.kept(measured._key("losses", name, seed), lambda value=float(number % 4): [value, value + 0.5])
            measured.kept(measured._key("right", name, seed), lambda: [1.0, 0.0])
        assert measured.has_all(seed)
    elsewhere = SimpleNamespace(**vars(arguments) | {"output": tmp_path / "other", "measured": [measured.kept.path]})
    assert all(map(orders.Measured(orders.Plan(elsewhere), elsewhere).has_all, plan.seeds)), "known from another run"
    found = orders.claims(plan, measured)
    # Candidates are numbered in order, at every number of steps; then come labels, scattered, random: 0, 1, 2.
    assert found["order_holds_from_10"] == ([[1.0], [1.0]], "Kendall's tau")
    assert found["width_beats_depth"] == ([[3.0, 3.0]] * 2, "nats a token")
    assert found["kl_beats_labels"][0] == [[-1.0, -1.0]] * 2
    assert found["reconstruction_saves_tokens"][0] == [[0.0]] * 2
    assert found["contiguous_beats_scattered"] == ([[0.0, 0.0]] * 2, "accuracy")
    assert found["contiguous_beats_scattered_by_loss"][0] == [[-2.0, -2.0]] * 2
    assert orders.settled(plan, measured) == {
        "pairs": ["w30, d28", "w30, d22", "w30, d18", "d28, d22", "d28, d18", "d22, d18"],
        "as_before": {"10": 6, "40": 6},
    }
