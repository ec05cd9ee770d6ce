"""A pruning takes its sizes from the output of a search: in a pipeline, from the command line, in a dry run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.checkpoints import tiny_checkpoint

from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
from nemo_minitron.config import IterateConfig, PruneConfig, SearchConfig, TargetConfig, load, load_pipeline
from nemo_minitron.errors import CheckpointError, ConfigError
from nemo_minitron.jobs.dry_run import planned
from nemo_minitron.jobs.output import Output
from nemo_minitron.search import Result, Sizes
from nemo_minitron.search.results import best_sizes
from nemo_minitron.shape import ModelShape
from nemo_minitron.stages import iterate, prune

DATA: dict[str, Any] = {"sources": [{"name": "text", "path": "text.txt"}]}
PIPELINE: dict[str, Any] = {
    "output": "run",
    "defaults": {"data": DATA},
    "stages": [
        {
            "stage": "search",
            "model": "model",
            "scores": "scores",
            "space": {"num_layers": {"min": 1}},
            "budget": {"share": 0.8},
        },
        {"stage": "prune", "model": "model", "method": "random", "format": "hf", "target": "${output}/search"},
    ],
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, something in the place of scores and of a text, and the pipeline."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(open_checkpoint(tiny_checkpoint(tmp_path / "hf")), tmp_path / "model", "nemo2")
    (tmp_path / "scores").mkdir()
    (tmp_path / "text.txt").write_text("words and words")
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(PIPELINE))
    return tmp_path


def write_search(folder: Path, model: ModelShape, layers: int) -> None:
    """The result of a search whose best shape has so many layers; a worse one has all."""
    best, other = (Sizes.of(model)._replace(num_layers=count) for count in (layers, model.num_layers))
    candidates = [Result(best, 1, loss=1.0).to_dict(), Result(other, 2, loss=2.0).to_dict()]
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format_version": 1, "best": best.name, "candidates": candidates}
    (folder / "search.json").write_text(json.dumps(content))


def stages(home: Path, *overrides: str) -> tuple[SearchConfig, PruneConfig]:
    search, pruned = load_pipeline(home / "pipeline.yaml", overrides)[1]
    assert isinstance(search, SearchConfig) and isinstance(pruned, PruneConfig)
    return search, pruned


def test_a_path_stands_for_a_search(home: Path) -> None:
    _, pruned = stages(home)
    assert pruned.target == TargetConfig(search="run/search")
    assert pruned.inputs() == {"model": "model", "target.search": "run/search"}
    (home / "prune.yaml").write_text("model: model\noutput: out\nmethod: random\ntarget: {num_layers: 2}\n")
    alone = load("prune", "prune.yaml", ["target=~/x/search"])
    assert isinstance(alone, PruneConfig)
    assert alone.target == TargetConfig(search=str(Path("~/x/search").expanduser()))
    (home / "iterate.yaml").write_text(yaml.safe_dump({"model": "model", "output": "out", "data": DATA, "target": "s"}))
    rounds = load("iterate", "iterate.yaml")
    assert isinstance(rounds, IterateConfig)
    assert rounds.inputs() == {"model": "model", "target.search": "s"}


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ("target: {search: s, num_layers: 2}", "target.search=s: gives all sizes; leave out num_layers"),
        ("target: s\nlayers_to_drop: [1]", "layers_to_drop: the search gives the number of layers"),
        ("target: 7", "target=7: must be a mapping"),
        ("target: [s]", "target=['s']: must be a mapping"),
        ("target: $NOWHERE/s", "target.search=$NOWHERE/s: the environment variable NOWHERE is not set"),
    ],
)
def test_what_does_not_go_together(home: Path, settings: str, fault: str) -> None:
    (home / "prune.yaml").write_text(f"model: m\noutput: o\nmethod: random\n{settings}\n")
    with pytest.raises(ConfigError) as refused:
        load("prune", "prune.yaml")
    assert any(fault in given for given in refused.value.faults), refused.value.faults


def test_scores_are_needed_since_the_search_may_narrow_the_model(home: Path) -> None:
    (home / "prune.yaml").write_text("model: m\noutput: o\ntarget: s\n")
    with pytest.raises(ConfigError, match="scores: method=activation needs"):
        load("prune", "prune.yaml")


def test_a_dry_run_knows_that_the_shape_comes_later(home: Path) -> None:
    search, pruned = stages(home)
    second = list(planned([search, pruned]))[1]
    plan = second.plan
    assert plan is not None
    assert second.faults == []
    assert plan.costs["target"] == "the shape that the search chooses"
    assert plan.makes == {pruned.output: None}
    assert [item.path for item in plan.reads if item.comes_from(second.produced)] == ["run/search/search.json"]
    assert any("known when the search has run" in note for note in plan.notes)
    assert "parameters" not in plan.costs

    # without the search before it the shape is missing, and a search that has run tells it
    assert next(planned([pruned])).faults == ["shape of a search: run/search/search.json does not exist"]
    write_search(home / "run" / "search", open_checkpoint(home / "model").shape, 2)
    plan = prune.plan(pruned)
    assert "->" in plan.costs["parameters"]
    assert any("as it is now" in note for note in plan.notes)


def test_the_pruned_model_has_the_shape(home: Path) -> None:
    model = open_checkpoint(home / "model").shape
    write_search(home / "run" / "search", model, 2)
    _, pruned = stages(home)
    (home / "run").mkdir(exist_ok=True)
    metrics = prune.run(pruned)
    assert metrics["shape"] == dataclasses.replace(model, num_layers=2).to_dict()
    made = open_checkpoint(home / "run" / "prune")
    assert made.shape.num_layers == 2
    assert made.lineage["search"] == "run/search"


def test_rounds_end_at_the_shape(home: Path) -> None:
    write_search(home / "search", open_checkpoint(home / "model").shape, 2)
    settings = {"model": "model", "output": "out", "data": DATA, "target": "search", "rounds": 2}
    (home / "iterate.yaml").write_text(yaml.safe_dump(settings))
    config = load("iterate", "iterate.yaml")
    assert isinstance(config, IterateConfig)
    plan = iterate.plan(config)
    assert plan.faults == []
    assert "->" in plan.costs["parameters"]
    absent = dataclasses.replace(config, target=TargetConfig(search="absent"))
    assert "parameters" not in iterate.plan(absent).costs


def test_another_search_makes_it_again(home: Path) -> None:
    """The identity depends on the search's, and not on the path."""
    search, pruned = stages(home)
    model = open_checkpoint(home / "model").shape
    write_search(home / "run" / "search", model, 2)
    Output(search).finish({}, 1.0)
    (home / "run" / "prune").mkdir()
    Output(pruned).finish({}, 1.0)
    assert Output(pruned).state() == ("done", [])
    (home / "run").rename(home / "moved")
    assert Output(stages(home, "output=moved")[1]).state() == ("done", [])
    (home / "moved").rename(home / "run")

    changed, _ = stages(home, "stages.search.budget.share=0.7")
    write_search(home / "run" / "search", model, 1)
    Output(changed).finish({}, 1.0)
    assert Output(pruned).state() == ("changed", ["target.search: run/search has changed"])
    sizes = dataclasses.replace(pruned, target=TargetConfig(num_layers=1))
    assert Output(sizes).hash != Output(pruned).hash


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no readable result of a search"),
        ("{", "no readable result of a search"),
        ("[]", "no readable result of a search"),
        ('{"format_version": 9}', "format version 9"),
        ('{"format_version": 1}', "does not name one of its candidates"),
        ('{"format_version": 1, "best": "b", "candidates": []}', "does not name one of its candidates"),
        ('{"format_version": 1, "best": "b", "candidates": [{"name": "b", "sizes": 7}]}', "does not name one"),
    ],
)
def test_results_that_cannot_be_read(home: Path, content: str | None, message: str) -> None:
    (home / "run" / "search").mkdir(parents=True)
    if content is not None:
        (home / "run" / "search" / "search.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        best_sizes("run/search")
    _, pruned = stages(home)
    with pytest.raises(CheckpointError, match=message):
        prune.run(pruned)
    if content is not None:
        (fault,) = prune.plan(pruned).faults
        assert fault.startswith("target.search: run/search/search.json: ")
