"""``minitron search`` from a model to the best shape, stopped on the way and gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.checkpoints import tiny_checkpoint
from support.pruning import one_process
from support.text import write_jsonl

from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.config import STAGES, ScoreConfig, SearchConfig, load
from nemo_minitron.errors import ConfigError, MinitronError, ShapeError
from nemo_minitron.jobs import nested
from nemo_minitron.jobs.output import Output
from nemo_minitron.stages import score, search
from nemo_minitron.stages.shared import search_ranking

SIZES = {"num_hidden_layers": 3, "intermediate_size": 64}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in the working format, text for it, and its scores."""
    from nemo_minitron.checkpoints import write_checkpoint

    home = tmp_path_factory.mktemp("search")
    write_checkpoint(open_checkpoint(tiny_checkpoint(home / "hf", **SIZES)), home / "model", "nemo2")
    words = torch.randint(0, 125, (120, 30), generator=torch.Generator().manual_seed(0)).tolist()
    write_jsonl(home / "text.jsonl", [" ".join(f"w{number}" for number in row) for row in words])
    settings = yaml.safe_load(SETTINGS.format(home=home))
    (home / "score.yaml").write_text(
        yaml.safe_dump({key: settings[key] for key in ("model", "data", "samples")} | {"output": str(home / "scores")})
    )
    scoring = load("score", home / "score.yaml", [])
    assert isinstance(scoring, ScoreConfig)
    with one_process():
        score.run(scoring)
    return home


SETTINGS = """
model: {home}/model
scores: {home}/scores
output: {home}/out
space:
  num_layers: {{min: 2}}
  ffn_hidden_size: {{min: 16, multiple: 16}}
budget: {{share: 0.85, tolerance: 0.2}}
max_candidates: 3
samples: 4
micro_batch_size: 2
best: 2
distill: {{steps: 2, global_batch_size: 2, warmup_steps: 0}}
data:
  sources: [{{name: text, path: {home}/text.jsonl}}]
  sequence_length: 16
  calibration_fraction: 0.3
  held_out_fraction: 0.2
  cache_dir: {home}/cache
runtime: {{threads: 1}}
"""


def config(home: Path, output: str, *overrides: str) -> SearchConfig:
    path = home / "search.yaml"
    path.write_text(SETTINGS.format(home=home))
    found = load("search", path, [f"output={home / output}", *overrides])
    assert isinstance(found, SearchConfig)
    return found


def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Rankings run in this process instead of one of their own; each is noted."""
    ran: list[str] = []

    def launch(module: str, arguments: list[str], *, folder: Path, **_: Any) -> None:
        assert arguments == ["search", "shared.search_ranking"]
        ran.append(folder.name)
        monkeypatch.setattr(search_ranking, "job_folder", lambda: folder)
        settings = load("search", folder / "config.yaml", [])
        assert isinstance(settings, SearchConfig)
        with one_process():
            search_ranking.run(settings)

    monkeypatch.setattr(search, "launch", launch)
    return ran


def fake_stages(monkeypatch: pytest.MonkeyPatch, home: Path, *, fail_at: int | None = None) -> list[str]:
    """Pruning and distilling that hand the teacher on, or fail at the given call."""
    import shutil

    calls: list[str] = []

    def run_output(output: Output, on_output: Any = None) -> dict[str, Any]:
        stage = output.config
        if fail_at is not None and len(calls) == fail_at:
            raise MinitronError("stopped")
        calls.append(f"{stage.STAGE} {Path(stage.output).parent.name}")
        target = Path(stage.output) / ("model" if stage.STAGE == "distill" else "")
        shutil.copytree(home / "model", target, dirs_exist_ok=True)
        return {}

    monkeypatch.setattr(nested, "run_output", run_output)
    return calls


@pytest.mark.slow
def test_a_stopped_search_goes_on_candidate_by_candidate(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = here(monkeypatch)
    calls = fake_stages(monkeypatch, home, fail_at=3)
    with pytest.raises(MinitronError, match="stopped"):
        search.run(config(home, "stopped"))
    first = list(calls)
    assert len(first) == 3 and ran[0] == "ranking" and ran[1].startswith("distilled-")
    journal = (home / "stopped/candidates.jsonl").read_text()
    with (home / "stopped/candidates.jsonl").open("a") as stream:
        stream.write('{"name": "l2-h48')  # what a kill may leave

    calls = fake_stages(monkeypatch, home)
    metrics = search.run(config(home, "stopped"))
    assert metrics["candidates"] == metrics["resumed"] == metrics["ranked"] == 3 and metrics["distilled"] == 2
    assert [name for name in ran if name == "ranking"] == ["ranking"], "the ranking is not repeated"
    assert not set(calls) & set(first[:2]), "a finished candidate is not distilled again"
    assert (home / "stopped/candidates.jsonl").read_text().startswith(journal)
    found = json.loads((home / "stopped/search.json").read_text())
    assert {one["state"] for one in found["candidates"]} == {"ranked", "distilled"}
    best = yaml.safe_load((home / "stopped/best.yaml").read_text())["target"]
    assert best["num_layers"] in (2, 3)
    assert "kept" not in best
    assert (home / "stopped/search.md").stat().st_size > 200
    assert (home / "stopped/pareto.png").stat().st_size > 5000

    with pytest.raises(ConfigError, match="made with other settings"):
        search.run(config(home, "stopped", "samples=3"))


@pytest.mark.slow
def test_memory_and_latency_are_budgets(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = here(monkeypatch)
    fake_stages(monkeypatch, home)
    timed = config(
        home, "latency", "budget.share=null", "budget.latency_ms=1000000", "budget.floor=0", "best=0",
        "budget.sequence_length=16",
    )  # fmt: skip
    search.run(timed)
    assert ran[0] == "latency" and ran[1] == "ranking"
    found = json.loads((home / "latency/search.json").read_text())
    assert all(one["prefill"] > 0 and one["decode"] > 0 and one["memory"] > 0 for one in found["candidates"])
    with pytest.raises((MinitronError, ShapeError), match="latency_ms"):
        search.run(config(home, "fast", "budget.share=null", "budget.latency_ms=0.0001", "best=0"))

    sizes = [one["memory"] for one in found["candidates"]]
    limit = (min(sizes) + max(sizes)) / 2 / 2**30
    small = config(
        home, "memory", "budget.share=null", f"budget.memory_gib={limit}", "budget.floor=0", "best=0",
        "budget.sequence_length=16",
    )  # fmt: skip
    search.run(small)
    found = json.loads((home / "memory/search.json").read_text())
    assert found["candidates"] and all(one["memory"] <= limit * 2**30 for one in found["candidates"])


@pytest.mark.slow
def test_the_plan_counts_and_refuses(home: Path) -> None:
    plan = search.plan(config(home, "plan"))
    assert not plan.faults
    assert "within the budget" in plan.costs["shapes"]
    empty = search.plan(config(home, "plan", "budget.share=0.01"))
    assert any("parameters" in fault for fault in empty.faults)
    assert "search" in STAGES


@pytest.mark.slow
def test_a_task_can_decide(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracies as the questions give them; the order goes by them, and by the loss where they are equal."""
    here(monkeypatch)
    fake_stages(monkeypatch, home)
    questions = [
        {"prompt": f"w{row} w{row + 1}", "choices": [f"w{row + shift} w{row * 7 % 120}" for shift in (2, 9, 31)],
         "answer": row % 3}
        for row in range(24)
    ]  # fmt: skip
    (home / "task.jsonl").write_text("\n".join(map(json.dumps, questions)) + "\n")
    settings = ["task.path=" + str(home / "task.jsonl"), "rank_by=task", "best=1"]
    plan = search.plan(config(home, "task", *settings))
    assert str(home / "task.jsonl") in [str(read.path) for read in plan.reads]
    metrics = search.run(config(home, "task", *settings))
    content = json.loads((home / "task/search.json").read_text())
    ranked = [one for one in content["candidates"] if one["state"] == "ranked"]
    distilled = [one for one in content["candidates"] if one["state"] == "distilled"]
    assert len(distilled) == 1 and len(ranked) == 2
    everything = [*ranked, *distilled]
    assert all(round(24 * one["accuracy"]) == pytest.approx(24 * one["accuracy"]) for one in everything)
    first = min(everything, key=lambda one: (-one["accuracy"], one["loss"]))
    assert distilled == [first]
    assert ranked == sorted(ranked, key=lambda one: (-one["accuracy"], one["loss"]))
    # the student is the teacher here
    assert metrics["distilled_accuracy"] == content["unpruned"]["accuracy"]
    assert metrics["accuracy"] == first["accuracy"]
    assert "accuracy, untrained" in (home / "task/search.md").read_text()
    assert content["rank_by"] == "task"

    with pytest.raises(ConfigError, match="rank_by=task: there is no task; set task.path or task.builtin"):
        config(home, "none", "rank_by=task")
    with pytest.raises(ConfigError, match="rank_by=best: must be one of loss, task"):
        config(home, "none", "rank_by=best")


@pytest.mark.slow
def test_candidates_are_ranked_after_reconstruction(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By text that the fit did not see; what is distilled is reconstructed too."""
    from nemo_minitron.axes import KeptUnits
    from nemo_minitron.checkpoints import Checkpoint

    fitted: list[int] = []
    changed: list[int] = []
    whole = search_ranking._Ranking._refitted

    def refitted(ranking: Any, pruned: Checkpoint, kept: KeptUnits) -> Checkpoint:
        result = whole(ranking, pruned, kept)
        fitted.append(len(ranking.fitted))
        assert len(ranking.blocks) == 4
        assert not {*map(tuple, ranking.fitted.tokens.tolist())} & {*map(tuple, ranking.blocks.tokens.tolist())}
        names = result.weights.names()
        changed.append(sum(not torch.equal(result.weights.tensor(n), pruned.weights.tensor(n)) for n in names))
        return result

    monkeypatch.setattr(search_ranking._Ranking, "_refitted", refitted)
    here(monkeypatch)
    calls = fake_stages(monkeypatch, home)
    given = config(home, "refitted", "reconstruct_samples=10", "best=1")
    assert search.plan(given).costs["reconstruction"] == "160 tokens in 10 samples, for each candidate"
    search.run(given)
    content = json.loads((home / "refitted/search.json").read_text())
    assert fitted == [10, 10, 10]
    assert sum(changed) > 0
    assert [call.split()[0] for call in calls] == ["prune", "reconstruct", "distill"]
    assert all(one["loss"] is not None for one in content["candidates"])
    with pytest.raises(ConfigError, match="reconstruct_samples=3: every 5th sample is held out"):
        config(home, "none", "reconstruct_samples=3")
    with pytest.raises(ConfigError, match="parallel.tensor=2: a layer at a time"):
        config(home, "none", "reconstruct_samples=10", "parallel.tensor=2")


# ------------------------------------------------------------------------------------------------ jobs of a cluster

PIPELINE = """
name: jobs
output: {home}/run
defaults:
  runtime: {{threads: 1}}
stages:
  - {{stage: search, name: searched, best: 2, max_candidates: 3, save_student: true, {search}}}
  - {{stage: iterate, name: rounds, model: {home}/model, rounds: 2, samples: 4, target: {{ffn_hidden_size: 32}},
      data: {data}}}
  - {{stage: prune, name: pruned, model: {home}/model, scores: {home}/scores, target: "${{output}}/searched"}}
"""
CLUSTER = {
    "account": "a",
    "gpus_per_node": 0,
    "tasks_per_node": 2,
    "partition": "main",
    "stage_time": {"prune": "00:07:00"},
}
ALL = ["searched.ranking", *(f"searched.{n}.{what}" for n in (1, 2) for what in ("student", "distilled", "measured"))]


@pytest.mark.slow
def test_candidates_and_rounds_are_jobs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the jobs find is what one leading process finds. After a failure, and after an end in the middle, the same
    command submits what is missing, and no more.
    """
    from rich.console import Console
    from support.fake_slurm import FakeSlurm

    from nemo_minitron.config import load_pipeline, load_slurm
    from nemo_minitron.jobs.local import run_stage
    from nemo_minitron.jobs.records import read_record
    from nemo_minitron.jobs.slurm_queue import cancel_jobs
    from nemo_minitron.jobs.slurm_submit import submit
    from nemo_minitron.jobs.status import status_of
    from nemo_minitron.jobs.warm import warm_pool

    cluster = FakeSlurm.installed(home / "cluster", monkeypatch)
    settings = yaml.safe_load(SETTINGS.format(home=home))
    kept = ("model", "scores", "space", "budget", "samples", "micro_batch_size", "distill", "data")
    (home / "jobs.yaml").write_text(
        PIPELINE.format(
            home=home,
            search=", ".join(f"{name}: {json.dumps(settings[name])}" for name in kept),
            data=json.dumps(settings["data"]),
        )
    )
    (home / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115  # nemo_run's shell reads it

    def submitted(*overrides: str, dry_run: bool = False) -> dict[str, str]:
        pipeline, stages = load_pipeline(home / "jobs.yaml", overrides)
        slurm = load_slurm(home / "cluster.yaml")
        return submit(pipeline, stages, slurm, overwrite=False, dry_run=dry_run, console=Console(quiet=True))

    with warm_pool("cpu"):
        first = submitted()
        assert list(first) == [*ALL, "searched", "rounds.round-1", "rounds", "pruned"]
        assert cluster.after(first["searched.2.student"]) == {first["searched.ranking"]}
        assert cluster.after(first["pruned"]) == {first["searched"]}
        for name in ALL:
            assert ("#SBATCH --time=00:07:00" in cluster.script(first[name])) == name.endswith("student")
            assert "#SBATCH --partition=main" in cluster.script(first[name])
            assert "#SBATCH --account=a" in cluster.script(first[name])
        scripts = submitted(f"output={home}/elsewhere", dry_run=True)
        assert list(scripts) == list(first)
        assert "--dependency='afterok:<searched.1.measured>:<searched.2.measured>'" in scripts["searched"]
        assert not (home / "elsewhere").exists()
        with pytest.raises(ConfigError, match=rf"job {first['searched']} is in the queue with other settings"):
            submitted("stages.searched.samples=3")
        assert submitted() == {}, "all of them are in the queue"

        # A candidate fails: what waits for it leaves the queue, the other one goes on.
        for name in ("ranking", "1.student", "2.student"):
            assert cluster.run(first[f"searched.{name}"]) == 0
        students = sorted((home / "run/searched/candidates").glob("*/student"))
        assert len(students) == 2
        second = yaml.safe_load((cluster.folder(first["searched.2.student"]) / "config.yaml").read_text())
        (Path(second["output"]) / "minitron.json").unlink()
        assert cluster.run(first["searched.2.distilled"]) == 2
        assert cluster.state(first["searched"]) == cluster.state(first["pruned"]) == "CANCELLED"
        cluster.state(first["searched.1.distilled"], "RUNNING")
        failed = {stage.name: stage for stage in status_of(home / "run").stages}
        assert (failed["searched"].state, failed["searched"].exit_code) == ("failed", 2)
        assert "2.distilled: job" in str(failed["searched"].error) and "minitron.json" in str(failed["searched"].error)
        assert failed["rounds"].state == "queued"

        # The lead is gone in the middle: what runs is waited for, what is done is not run again.
        again = submitted()
        assert list(again) == [
            *(f"searched.2.{what}" for what in ("student", "distilled", "measured")),
            "searched",
            "pruned",
        ]
        assert cluster.after(again["searched"]) == {first["searched.1.measured"], again["searched.2.measured"]}
        assert cluster.after(again["searched.2.student"]) == set()
        assert {stage.name: stage.state for stage in status_of(home / "run").stages}["searched"] == "running"
        cluster.state(first["searched.1.distilled"], "PENDING")

        # Cancelled by name; then to the end.
        assert set(cancel_jobs(home / "run", ["rounds"])) == {"rounds.round-1", "rounds"}
        with pytest.raises(ConfigError, match="other: is no stage or job of"):
            cancel_jobs(home / "run", ["other"])
        assert {stage.name: stage.state for stage in status_of(home / "run").stages}["rounds"] == "cancelled"
        rounds = submitted()
        assert list(rounds) == ["rounds.round-1", "rounds"]
        cluster.run_all()
        assert len(cluster.started) == len(set(cluster.started)) == 4 + 5 + 4, "no job ran twice"
        assert submitted() == {}
        assert {stage.state for stage in status_of(home / "run").stages} == {"done"}

        # One leading process, as the command runs it, in this pool.
        alone = load_pipeline(home / "jobs.yaml", [f"output={home}/alone"])[1]
        records = [run_stage(stage) for stage in alone[:2]]
    ours, lead = (json.loads((home / run / "searched/search.json").read_text()) for run in ("run", "alone"))
    for found in (ours, lead):
        for candidate in found["candidates"]:
            seconds = candidate.pop("distill_seconds")
            assert (seconds is not None and seconds > 0) == (candidate["state"] == "distilled")
    assert ours == lead
    record = read_record(home / "run/rounds")
    assert record is not None
    assert record["metrics"]["resumed"] == 1 and records[1]["metrics"]["resumed"] == 0
    for name in ("rounds", "shape", "layers", "parameters"):
        assert record["metrics"][name] == records[1]["metrics"][name]
    both = [open_checkpoint(home / run / "rounds") for run in ("run", "alone")]
    for name in both[0].weights.names():
        assert torch.equal(both[0].weights.tensor(name), both[1].weights.tensor(name))
    best = next(candidate for candidate in ours["candidates"] if candidate["name"] == ours["best"])
    assert open_checkpoint(home / "run/pruned").shape.ffn_hidden_size == best["sizes"]["ffn_hidden_size"]
    students = [home / run / "searched/candidates" / ours["best"] / "distilled" for run in ("run", "alone")]
    both = [open_checkpoint(student / "model") for student in students]
    assert both[0].shape.ffn_hidden_size == best["sizes"]["ffn_hidden_size"]
    for student, run in zip(students, ("run", "alone"), strict=True):
        assert [path.name for path in (home / run / "searched/candidates").iterdir()] == [ours["best"]]
        assert not (student / "checkpoints").exists() and {path.name for path in student.parent.iterdir()} == {
            "distilled",
            "logs",
        }
    for name in both[0].weights.names():
        assert torch.equal(both[0].weights.tensor(name), both[1].weights.tensor(name))
