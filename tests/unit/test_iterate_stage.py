"""``minitron iterate`` on a tiny model: what the rounds choose, and going on after a stop."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.checkpoints import hf_logits, tiny_checkpoint, tokens
from support.pruning import one_process
from support.text import write_jsonl

from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.config import DataConfig, IterateConfig, PruneConfig, ScoreConfig, SourceConfig, TargetConfig
from nemo_minitron.errors import ShapeError
from nemo_minitron.pruning import load_kept
from nemo_minitron.stages import iterate, prune, score
from nemo_minitron.stages.shared import iterate_rounds

TARGET = {"ffn_hidden_size": 20, "hidden_size": 30, "num_layers": 2, "num_query_groups": 1}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("iterate")
    tiny_checkpoint(home / "model")
    words = torch.randint(0, 125, (60, 30), generator=torch.Generator().manual_seed(0)).tolist()
    write_jsonl(home / "text.jsonl", [" ".join(f"w{number}" for number in row) for row in words])
    return home


def settings(home, output):
    data = DataConfig(
        sources=[SourceConfig(name="text", path=str(home / "text.jsonl"))],
        sequence_length=16,
        calibration_fraction=0.3,
        cache_dir=str(home / "cache"),
    )
    return {"model": str(home / "model"), "output": str(output), "data": data, "samples": 4, "micro_batch_size": 2}


def config_of(home, output, **changes):
    more = {"target": TargetConfig(**TARGET), "rounds": 2, "format": "hf"}
    return IterateConfig(**settings(home, output) | more | changes)


def test_rounds_are_score_and_prune_by_turns_and_a_stopped_run_goes_on(home, tmp_path, monkeypatch):
    """Also: nothing of the rounds is left behind, and units are counted in the unpruned model."""
    config = config_of(home, tmp_path / "iterated")
    planned = iterate.plan(config)
    assert planned.faults == []
    with one_process():
        found = iterate.run(config)
    shapes = found["rounds"]
    assert (len(shapes), found["resumed"]) == (2, 0)
    sizes = [shapes[0][name] for name in ("ffn_hidden_size", "hidden_size", "num_layers")]
    assert sizes == [39, 38, 2]  # geometric: the roots of 76 x 20, 48 x 30 and 3 x 2
    assert shapes[1] == found["shape"]
    assert {path.name for path in tmp_path.iterdir()} == {"iterated"}
    kept, shape = load_kept(tmp_path / "iterated" / "kept.json")
    assert kept.target(shape) == open_checkpoint(tmp_path / "iterated").shape
    assert torch.isfinite(hf_logits(tmp_path / "iterated", tokens())).all()

    # By the stages one after the other.
    before = home / "model"
    for number, sizes in enumerate(shapes):
        with one_process():
            score.run(ScoreConfig(**settings(home, tmp_path / f"scores-{number}") | {"model": str(before)}))
        names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
        target = TargetConfig(**{name: sizes[name] for name in names})
        prune.run(
            PruneConfig(
                model=str(before),
                scores=str(tmp_path / f"scores-{number}"),
                output=str(tmp_path / f"pruned-{number}"),
                target=target,
                format="hf",
            )
        )
        before = tmp_path / f"pruned-{number}"
    by_hand, ours = (open_checkpoint(path) for path in (before, tmp_path / "iterated"))
    for name in ours.weights.names():
        assert torch.equal(ours.weights.tensor(name), by_hand.weights.tensor(name)), name

    # Stopped after its first round.
    again = config_of(home, tmp_path / "again")
    choose = iterate_rounds._score
    calls = []

    def stopped(config, checkpoint, *rest):
        calls.append(checkpoint.shape)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return choose(config, checkpoint, *rest)

    monkeypatch.setattr(iterate_rounds, "_score", stopped)
    with one_process(), pytest.raises(KeyboardInterrupt):
        iterate.run(again)
    assert not (tmp_path / "again").exists()
    assert any("goes on after round 1 of 2" in note for note in iterate.plan(again).notes)
    with one_process():
        resumed = iterate.run(again)
    assert resumed["resumed"] == 1
    assert len(calls) == 3
    assert load_kept(tmp_path / "again" / "kept.json") == (kept, shape)

    # Other settings do not go on with the rounds of these.
    calls.clear()
    with one_process(), pytest.raises(KeyboardInterrupt):
        iterate.run(dataclasses.replace(again, output=str(tmp_path / "other")))
    with one_process():
        assert iterate.run(config_of(home, tmp_path / "other", spacing="linear"))["resumed"] == 0


def test_targets_that_cannot_be_reached(home, tmp_path):
    prune.run(PruneConfig(model=str(home / "model"), output=str(tmp_path / "known"), method="random", format="hf",
                          target=TargetConfig(ffn_hidden_size=70)))  # fmt: skip
    config = config_of(home, tmp_path / "out", target=TargetConfig(ffn_hidden_size=99), model=str(tmp_path / "known"))
    assert any("ffn_hidden_size=99: the model has only 70" in fault for fault in iterate.plan(config).faults)
    config = dataclasses.replace(config, target=TargetConfig(ffn_hidden_size=39))
    layout = dataclasses.replace(config.parallel, tensor=2)
    faults = iterate.plan(dataclasses.replace(config, parallel=layout)).faults
    assert any("target: ffn_hidden_size=39 cannot be split" in fault for fault in faults)
    with one_process(), pytest.raises(ShapeError, match="the model has only 76"):
        iterate.run(config_of(home, tmp_path / "out", target=TargetConfig(ffn_hidden_size=99)))
    assert {path.name for path in tmp_path.iterdir()} == {"known"}
