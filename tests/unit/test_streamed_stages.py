"""``memory=streamed`` in the stages: the live results, plans, refusals, and what is left beside the output."""

from __future__ import annotations

import json

import pytest
import torch
from support.checkpoints import tiny_checkpoint
from support.pruning import one_process
from support.text import write_jsonl

from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
from nemo_minitron.config import DataConfig, DepthConfig, EvaluateConfig, ScoreConfig, SourceConfig
from nemo_minitron.importance import DepthScores, Scores
from nemo_minitron.stages import depth, evaluate, score
from nemo_minitron.stages.shared import streaming


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("streamed")
    tiny_checkpoint(home / "model")
    words = torch.randint(0, 125, (60, 30), generator=torch.Generator().manual_seed(0)).tolist()
    write_jsonl(home / "text.jsonl", [" ".join(f"w{number}" for number in row) for row in words])
    return home


def settings(home, output, **changes):
    data = DataConfig(
        sources=[SourceConfig(name="text", path=str(home / "text.jsonl"))],
        sequence_length=16,
        calibration_fraction=0.3,
        held_out_fraction=0.3,
        cache_dir=str(home / "cache"),
    )
    return {"output": str(output), "data": data, "micro_batch_size": 2, **changes}


def test_score(home, tmp_path):
    def run(name, **changes):
        config = ScoreConfig(model=str(home / "model"), samples=6, **settings(home, tmp_path / name, **changes))
        with one_process():
            score.run(config)
        return Scores.load(tmp_path / name)

    live, streamed = run("live", memory="live"), run("streamed", memory="streamed", states_memory="1KB")
    for name in ("ffn", "heads", "groups", "hidden", "layers"):
        torch.testing.assert_close(getattr(streamed, name), getattr(live, name), rtol=1e-6, atol=1e-9)
    assert (streamed.fingerprint, streamed.samples, streamed.tokens) == (live.fingerprint, live.samples, live.tokens)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["live", "streamed"]  # no file of the pass stays


def test_evaluate(home, tmp_path):
    models = {"one": str(home / "model"), "two": str(home / "model")}

    def run(name, **changes):
        config = EvaluateConfig(models=models, tokens=64, **settings(home, tmp_path / name, **changes))
        with one_process():
            evaluate.run(config)
        return json.loads((tmp_path / name / "evaluation.json").read_text())

    live, streamed = run("live", memory="live"), run("streamed", memory="streamed", states_memory="1KB")
    assert streamed["models"]["two"]["loss"] == pytest.approx(live["models"]["two"]["loss"], rel=1e-5)
    assert streamed["models"]["one"]["domains"].keys() == live["models"]["one"]["domains"].keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["live", "streamed"]


def test_depth(home, tmp_path):
    def run(name, **changes):
        wide = settings(home, tmp_path / name, **changes)
        with one_process():
            metrics = depth.run(DepthConfig(model=str(home / "model"), samples=6, greedy=1, block_lengths=[2], **wide))
        return DepthScores.load(tmp_path / name), metrics

    (live, _), (streamed, metrics) = run("live", memory="live"), run("streamed", memory="streamed", states_memory="1KB")
    assert streamed.measured.keys() == live.measured.keys()
    for layers, one in live.measured.items():
        assert streamed.measured[layers].loss == pytest.approx(one.loss, rel=1e-5)
    assert (streamed.fingerprint, streamed.tokens, metrics["resumed"]) == (live.fingerprint, live.tokens, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["live", "streamed"]  # no file of the pass stays


@pytest.mark.parametrize(("free", "expected"), [(10**5, True), (10**9, False)])
def test_auto_goes_by_the_free_memory(home, tmp_path, monkeypatch, free, expected):
    monkeypatch.setattr(streaming, "host_memory", lambda: (10**12, free))
    config = ScoreConfig(model=str(home / "model"), **settings(home, tmp_path / "scores"))
    assert config.memory == "auto"
    with one_process() as groups:
        assert streaming.streams(config, open_checkpoint(home / "model"), groups) is expected


def test_plans(home, tmp_path):
    model = tmp_path / "recorded"
    write_checkpoint(open_checkpoint(home / "model"), model, "nemo2")
    config = ScoreConfig(model=str(model), memory="streamed", **settings(home, tmp_path / "s"))
    assert score.plan(config).costs["memory of a rank"].endswith("beside up to 8GiB of hidden states")
    wide = DepthConfig(model=str(model), memory="streamed", states_memory="1KB", **settings(home, tmp_path / "d"))
    planned = depth.plan(wide)
    # The whole model and three without a layer, of 128 samples of 16 tokens with 48 channels.
    assert planned.costs["hidden states kept"].startswith("1.5 MiB of all candidates")
    assert [need.what for need in planned.disk if need.what == "hidden states"] == ["hidden states"]
    for one, stage in ((config, score), (wide, depth)):
        one.parallel = type(one.parallel)(tensor=2)
        assert any(fault.startswith("parallel.tensor=2") for fault in stage.plan(one).faults)


@pytest.mark.parametrize(
    ("stage", "given", "named"),
    [
        (ScoreConfig, {"memory": "stream"}, "memory=stream: must be one of auto, live, streamed"),
        (DepthConfig, {"memory": "stream"}, "memory=stream: must be one of auto, live, streamed"),
        (ScoreConfig, {"states_memory": "much"}, "states_memory=much: 'much' is not a size"),
        (ScoreConfig, {"memory": "streamed", "estimator": "taylor"}, "memory=streamed: the gradients"),
        (EvaluateConfig, {"memory": "streamed", "prompts": ["Hello"]}, "memory=streamed: prompts need"),
    ],
)
def test_refusals(stage, given, named):
    models = {"models": {"a": "m"}} if stage is EvaluateConfig else {"model": "m"}
    (fault,) = stage(**models, output="o", **given).faults()
    assert fault.startswith(named)
