"""``minitron depth`` and pruning by its scores on a tiny model, called as the worker calls them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from support.checkpoints import tiny_checkpoint
from support.pruning import one_process
from support.text import write_jsonl

from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.config import DataConfig, DepthChoiceConfig, DepthConfig, PruneConfig, SourceConfig, TargetConfig
from nemo_minitron.config import TaskConfig as Task
from nemo_minitron.errors import CheckpointError, ConfigError, DataError, ShapeError
from nemo_minitron.importance import DepthScores
from nemo_minitron.pruning import load_kept
from nemo_minitron.runtime.journal import Journal
from nemo_minitron.stages import depth, prune, score

LAYERS = 5


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, text and a task for it, and its depth scores."""
    home = tmp_path_factory.mktemp("depth")
    tiny_checkpoint(home / "model", num_hidden_layers=LAYERS)
    words = torch.randint(0, 125, (60, 30), generator=torch.Generator().manual_seed(0)).tolist()
    lines = [" ".join(f"w{number}" for number in row) for row in words]
    write_jsonl(home / "text.jsonl", lines)
    questions = [
        {"prompt": lines[n], "choices": [line[:12].strip() for line in lines[n + 1 : n + 4]], "answer": n % 3}
        for n in range(8)
    ]
    (home / "task.jsonl").write_text("\n".join(json.dumps(question) for question in questions))
    with one_process():
        depth.run(config(home, home / "scores", block_lengths=[2], greedy=2, greedy_by="task"))
    return home


def config(home, output, **changes):
    data = DataConfig(
        sources=[SourceConfig(name="text", path=str(home / "text.jsonl"))],
        sequence_length=16,
        calibration_fraction=0.3,
        cache_dir=str(home / "cache"),
    )
    settings = {
        "model": str(home / "model"),
        "output": str(output),
        "data": data,
        "samples": 6,
        "micro_batch_size": 3,
        "task": Task(path=str(home / "task.jsonl")),
    }
    return DepthConfig(**{**settings, **changes})


def prune_config(home, output, criterion="loss", form="lowest", **changes):
    settings = {
        "model": str(home / "model"),
        "depth_scores": str(home / "scores"),
        "depth": DepthChoiceConfig(criterion, form),
        "output": str(output),
        "format": "hf",
        "target": TargetConfig(num_layers=LAYERS - 2),
    }
    return PruneConfig(**{**settings, **changes})


def test_the_file_and_the_metrics_agree(home, tmp_path):
    with one_process():
        metrics = depth.run(config(home, tmp_path / "again", block_lengths=[2], greedy=2, greedy_by="task"))
    scores = DepthScores.load(tmp_path / "again")
    assert scores == DepthScores.load(home / "scores")
    assert metrics["candidates"] == len(scores.measured) - 1
    assert (metrics["tokens"], metrics["questions"], metrics["resumed"]) == (96, 8, 0)
    assert metrics["baseline"]["accuracy"] == scores.measured[()].accuracy
    for layer in range(LAYERS):
        assert metrics["single"][str(layer)] == round(scores.costs("loss")[(layer,)][0], 6)
    assert not Journal.beside(tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("criterion", "form"), [("loss", "lowest"), ("loss", "contiguous"), ("task", "lowest"), ("task", "greedy")]
)
def test_pruning_takes_the_layers_that_cost_least(home, tmp_path, criterion, form):
    """Without any scores of units, since nothing but layers goes."""
    prune.run(prune_config(home, tmp_path / "pruned", criterion, form))
    kept, shape = load_kept(tmp_path / "pruned" / "kept.json")
    costs = DepthScores.load(home / "scores").costs(criterion)
    dropped = tuple(layer for layer in range(LAYERS) if layer not in kept.layers)
    if form == "contiguous":
        assert costs[dropped] == min(costs[n, n + 1] for n in range(LAYERS - 1))
    elif form == "lowest":
        singles = sorted(costs[(layer,)] for layer in range(LAYERS))
        assert sorted(costs[(layer,)] for layer in dropped) == singles[:2]
    else:
        first = min(range(LAYERS), key=lambda layer: (costs[(layer,)], -layer))
        assert first in dropped
        assert costs[dropped] == min(costs[tuple(sorted((first, n)))] for n in range(LAYERS) if n != first)
    assert kept.target(shape) == open_checkpoint(tmp_path / "pruned").shape == shape.replace(num_layers=LAYERS - 2)
    lineage = open_checkpoint(tmp_path / "pruned").lineage["depth"]
    assert lineage == {"criterion": criterion, "form": form, "scores": str(home / "scores")}


def test_width_by_scores_and_depth_by_loss_at_once(home, tmp_path):
    from nemo_minitron.config import ScoreConfig

    wide = {
        field.name: getattr(config(home, tmp_path / "units"), field.name) for field in dataclasses.fields(DepthConfig)
    }
    settings = {name: wide[name] for name in ("model", "output", "data", "samples", "micro_batch_size")}
    with one_process():
        influence = score.run(ScoreConfig(**settings))["layers"]
    target = TargetConfig(num_layers=LAYERS - 2, ffn_hidden_size=40)
    both = {"scores": str(tmp_path / "units"), "target": target}
    prune.run(prune_config(home, tmp_path / "both", form="contiguous", **both))
    prune.run(prune_config(home, tmp_path / "depth", form="contiguous"))
    kept = {name: load_kept(tmp_path / name / "kept.json")[0] for name in ("both", "depth")}
    assert kept["both"].layers == kept["depth"].layers
    assert len(kept["both"].ffn[0]) == 40
    # Block influence chooses runs too, by its sum.
    prune.run(prune_config(home, tmp_path / "bi", "block_influence", "contiguous", **both, depth_scores=None))
    dropped = set(range(LAYERS)) - set(load_kept(tmp_path / "bi" / "kept.json")[0].layers)
    first = min(range(LAYERS - 1), key=lambda n: influence[n] + influence[n + 1])
    assert dropped == {first, first + 1}


@pytest.mark.slow
def test_a_stopped_stage_goes_on(home, tmp_path, monkeypatch):
    """The plan says how much is done; what is started again measures the rest and writes the same file."""
    settings = config(home, tmp_path / "scores", block_lengths=[2], greedy=2, greedy_by="task")
    append, calls = Journal.append, []

    def stop(self, *args):
        append(self, *args)
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with one_process(), monkeypatch.context() as patch:
        patch.setattr(Journal, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            depth.run(settings)
    assert not (tmp_path / "scores").exists()
    assert Journal.entries(Journal.beside(tmp_path / "scores")) == 4
    with one_process():
        assert depth.run(settings)["resumed"] == 3
    same = (home / "scores" / "depth.json").read_bytes()
    assert (tmp_path / "scores" / "depth.json").read_bytes() == same
    # Another amount of data is another measurement.
    Journal.beside(tmp_path / "other").write_text("{}\n" + '{"layers": [0], "loss": 0.0, "accuracy": 0.0}\n')
    with one_process():
        assert depth.run(config(home, tmp_path / "other", samples=2))["resumed"] == 0


def test_the_plan(home, tmp_path):
    prune.run(prune_config(home, tmp_path / "model"))  # what we write states its shape to the plans
    settings = config(home, tmp_path / "scores", model=str(tmp_path / "model"), block_lengths=[2])
    found = depth.plan(settings)
    assert not found.faults
    assert found.costs["candidates"] == "5"
    assert {item.what for item in found.reads} == {"model", "text 'text'", "task"}
    assert settings.inputs() == {"model": settings.model, "task": str(home / "task.jsonl")}
    assert dataclasses.replace(settings, task=Task(builtin="next_verse")).inputs() == {"model": settings.model}
    Journal.beside(tmp_path / "scores").write_text('{}\n{"layers": [], "loss": 1}\n{"layers": [0], "loss": 1}\n')
    assert depth.plan(settings).costs["candidates"] == "5, 1 measured already"
    without = dataclasses.replace(settings, reuse_prefix=False)
    assert "hidden states kept" in found.costs
    assert "hidden states kept" not in depth.plan(without).costs
    faulty = dataclasses.replace(settings, block_lengths=[3], greedy=3)
    assert [fault.split(":")[0].split("=")[0] for fault in depth.plan(faulty).faults] == ["block_lengths", "greedy"]


def test_what_is_refused(home, tmp_path):
    with pytest.raises(ConfigError, match=r"run `minitron depth` with block_lengths=\[3\]"):
        prune.run(prune_config(home, tmp_path / "x", form="contiguous", target=TargetConfig(num_layers=2)))
    tiny_checkpoint(tmp_path / "other", num_hidden_layers=LAYERS, seed=7)
    with pytest.raises(CheckpointError, match="other weights"):
        prune.run(prune_config(home, tmp_path / "x", model=str(tmp_path / "other")))
    tiny_checkpoint(tmp_path / "deeper", num_hidden_layers=LAYERS + 1)
    with pytest.raises(ShapeError, match="num_layers: 5 in"):
        prune.run(prune_config(home, tmp_path / "x", model=str(tmp_path / "deeper")))
    (tmp_path / "task.jsonl").write_text("{}\n")
    with one_process(), pytest.raises(DataError, match="line 1: has no prompt"):
        depth.run(config(home, tmp_path / "x", task=Task(path=str(tmp_path / "task.jsonl"))))
    with one_process(), pytest.raises(ShapeError, match="a block of 5 cannot be left out of 5 layers"):
        depth.run(config(home, tmp_path / "x", block_lengths=[5]))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"single": False}, "nothing is to be measured"),
        ({"block_lengths": [0]}, "block_lengths: 0 must be above 0"),
        ({"greedy": -1}, "greedy=-1"),
        ({"greedy": 1, "greedy_by": "task", "task": Task()}, "there is no task"),
        ({"greedy_by": "luck"}, "greedy_by=luck"),
    ],
)
def test_faults_of_the_configuration(tmp_path, changes, fault):
    assert any(fault in one for one in config(tmp_path, tmp_path / "x", **changes).faults())


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"depth_scores": None}, "criterion=loss needs the directory"),
        ({"depth": DepthChoiceConfig()}, "is read by depth.criterion=loss or task alone"),
        ({"method": "random"}, "draws the layers"),
        ({"layers_to_drop": [1], "target": TargetConfig()}, "names the layers already"),
        ({"target": TargetConfig(num_layers=2, hidden_size=8)}, "needs the directory that `minitron score` wrote"),
    ],
)
def test_faults_of_a_pruning(tmp_path, changes, fault):
    assert any(fault in one for one in prune_config(tmp_path, tmp_path / "x", **changes).faults())
    assert DepthChoiceConfig("luck", "tall").faults()
    assert DepthChoiceConfig("block_influence", "greedy").faults()
