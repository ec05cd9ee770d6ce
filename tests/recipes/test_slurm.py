"""A pipeline on Slurm: the scripts, and a real one-node Slurm where this machine has its daemons."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from support.checkpoints import tiny_checkpoint
from support.slurm import job_states, missing, slurm
from support.text import write_jsonl

from nemo_minitron.config import load_pipeline, load_slurm, shipped_slurm
from nemo_minitron.errors import ConfigError
from nemo_minitron.jobs.records import read_record
from nemo_minitron.jobs.slurm_submit import jobs_of, submit
from nemo_minitron.jobs.status import StageStatus, status_of

DEFAULTS = """\
defaults:
  runtime: {{threads: 1}}
  data:
    sources: [{{name: text, path: {home}/text.jsonl}}]
    sequence_length: 16
    calibration_fraction: 0.3
    held_out_fraction: 0.2
    cache_dir: {home}/cache
"""
PIPELINE = (
    """
name: tiny
output: {home}/run
"""
    + DEFAULTS
    + """stages:
  - {{stage: import, name: teacher, source: {home}/hf}}
  - {{stage: score, name: scores, model: "${{output}}/teacher", samples: 4, parallel: {{tensor: 2}}}}
  - {{stage: prune, name: pruned, model: "${{output}}/teacher", scores: "${{output}}/scores",
     target: {{ffn_hidden_size: 48}}}}
  - {{stage: prune, name: random, model: "${{output}}/teacher", method: random, target: {{ffn_hidden_size: 48}}}}
  - stage: distill
    name: distilled
    student: ${{output}}/pruned
    teacher: ${{output}}/teacher
    steps: 2
    global_batch_size: 2
    warmup_steps: 0
    validate_every: 2
    validation_batches: 1
    parallel: {{tensor: 2}}
"""
)


JOBS = (
    """
name: jobs
output: {home}/jobs
"""
    + DEFAULTS
    + """stages:
  - stage: search
    name: searched
    model: {home}/run/teacher
    scores: {home}/run/scores
    space: {{ffn_hidden_size: {{min: 16, multiple: 16}}}}
    budget: {{share: 0.85, tolerance: 0.2}}
    max_candidates: 2
    samples: 4
    best: 1
    distill: {{steps: 2, global_batch_size: 2, warmup_steps: 0}}
    parallel: {{data: 2}}
  - {{stage: iterate, name: rounds, model: {home}/run/teacher, rounds: 2, samples: 4, target: {{ffn_hidden_size: 32}}}}
"""
)
IN_PLACE = """
import dataclasses
from nemo_minitron.config import load_pipeline
from nemo_minitron.jobs.in_place import run_in_place
stage = load_pipeline("{home}/pipeline.yaml")[1][-1]
run_in_place(dataclasses.replace(stage, output="{home}/in_place", teacher_placement="own_ranks"))
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """A tiny model and its text. (Not pytest's own directory, whose path is too long for a socket.)"""
    folder = Path(tempfile.mkdtemp(prefix="mt", dir="/tmp"))
    tiny_checkpoint(folder / "hf", num_attention_heads=8, num_key_value_heads=8, intermediate_size=80)
    words = torch.randint(0, 125, (120, 30), generator=torch.Generator().manual_seed(0)).tolist()
    write_jsonl(folder / "text.jsonl", [" ".join(f"w{number}" for number in row) for row in words])
    (folder / "pipeline.yaml").write_text(PIPELINE.format(home=folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_keyboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """nemo_run's shell commands read the keyboard, which pytest forbids."""
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        yield


def options(script: str) -> dict[str, str]:
    """The ``#SBATCH`` lines of a script."""
    return {name: value.strip("'") for name, value in re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, re.M)}


def console() -> Console:
    return Console(quiet=True)


def dry(pipeline_file: Path, slurm_file: str | Path, *settings: str, overrides: tuple[str, ...] = ()) -> dict[str, str]:
    pipeline, stages = load_pipeline(pipeline_file, overrides)
    found = load_slurm(slurm_file, settings)
    return submit(pipeline, stages, found, overwrite=False, dry_run=True, console=console())


@pytest.mark.slow
def test_scripts_of_a_dgx_cluster(home: Path) -> None:
    scripts = dry(
        home / "pipeline.yaml",
        "dgx",
        "extra={reservation: pruning}",
        f"container_mounts=['{home}:{home}']",
        overrides=("stages.distilled.parallel={tensor: 8, data: 2}",),
    )
    assert list(scripts) == ["teacher", "scores", "pruned", "random", "distilled"]
    after = {name: options(script).get("dependency", "") for name, script in scripts.items()}
    assert after == {
        "teacher": "",
        "scores": "afterok:<teacher>",
        "pruned": "afterok:<teacher>:<scores>",
        "random": "afterok:<teacher>",
        "distilled": "afterok:<teacher>:<pruned>",
    }
    wide, narrow = options(scripts["distilled"]), options(scripts["scores"])
    assert (wide["nodes"], wide["ntasks-per-node"], wide["gpus-per-node"]) == ("2", "8", "8")
    assert (narrow["nodes"], narrow["ntasks-per-node"]) == ("1", "2")
    assert (wide["time"], narrow["time"]) == ("1-00:00:00", "04:00:00")
    assert wide["account"] == "my_account"
    assert wide["reservation"] == "pruning"
    assert wide["signal"] == "USR1@180"
    assert "exclusive" in wide
    script = scripts["distilled"]
    assert "export TORCHX_MAX_RETRIES=3" in script, "requeued"
    image = Path("nemo-minitron.sqsh").absolute()
    assert f"--container-image {image}" in script
    assert f"{home}:{home}" in script
    assert "export CUDA_DEVICE_MAX_CONNECTIONS=1" in script
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in scripts["teacher"]
    lonely = options(scripts["teacher"])
    assert (lonely["gpus-per-node"], "exclusive" in lonely) == ("1", False)
    assert "kill-on-invalid-dep" not in lonely
    assert wide["kill-on-invalid-dep"] == narrow["kill-on-invalid-dep"] == "yes"
    assert f"python -m nemo_minitron.jobs.slurm_rank {home}/run/logs/distilled" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert not (home / "run").exists(), "a dry run leaves nothing behind"


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped_slurm())
def test_shipped_settings_and_their_commands(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(__file__).resolve().parents[2] / "configs" / "slurm" / f"{name}.yaml"
    words = re.search(
        r"^#   minitron run configs/(\S+)\.yaml --slurm configs/slurm/(\S+)\.yaml", path.read_text(), re.M
    )
    assert words is not None
    assert words[2] == name
    mounts = (f"container_mounts=['{tmp_path}:{tmp_path}']",) if name == "dgx" else ()
    scripts = dry(Path(words[1]), name, *mounts)
    assert scripts
    assert list(tmp_path.iterdir()) == []


def test_faults(home: Path) -> None:
    def faults(*settings: str) -> str:
        with pytest.raises(ConfigError) as raised:
            load_slurm("bare", settings)
        return str(raised.value)

    (home / "nobody.yaml").write_text("gpus_per_node: 8\n")
    with pytest.raises(ConfigError, match="account: must be given"):
        load_slurm(home / "nobody.yaml")
    assert "time=4 hours: must be [D-]HH:MM:SS" in faults("time=4 hours")
    assert "container_mounts: there is no container" in faults("container_mounts=[/a:/b]")
    assert "tasks_per_node: must be given" in faults("tasks_per_node=null")
    assert "SSH also needs user and job_dir" in faults("host=login")
    with pytest.raises(ConfigError, match="no such file; shipped ones: bare, dgx"):
        load_slurm("nowhere.yaml")
    _, stages = load_pipeline(home / "pipeline.yaml", ["stages.distilled.parallel={tensor: 3}"])
    with pytest.raises(ConfigError, match="its 3 processes do not fill nodes of 2"):
        jobs_of(stages, load_slurm("bare"), overwrite=False)


@pytest.mark.slow
@pytest.mark.timeout(800)
@pytest.mark.skipif(bool(missing()), reason=f"Slurm is not installed: {', '.join(missing())} missing")
def test_a_real_slurm_runs_the_pipeline(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Submitted by the command line, in order, to the end; nothing is left to submit then; a refusal ends at once."""
    settings = {"account": "test", "gpus_per_node": 0, "tasks_per_node": 2, "time": "00:20:00", "signal": None,
                "python": sys.executable, "retries": 2}  # fmt: skip
    (home / "slurm.yaml").write_text(yaml.safe_dump(settings))
    command = [
        sys.executable, "-m", "nemo_minitron", "run", str(home / "pipeline.yaml"), "--slurm", str(home / "slurm.yaml"),
    ]  # fmt: skip
    with slurm(home / "slurm") as env:

        def run(*overrides: str, submission: list[str] = command) -> str:
            done = subprocess.run(
                [*submission, *overrides], env=env, capture_output=True, text=True, timeout=120, check=False
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        def wait(limit: float = 450, each: Callable[[], object] = lambda: None) -> dict[str, str]:
            deadline = time.monotonic() + limit
            while any(state in ("PENDING", "RUNNING", "COMPLETING") for state in job_states(env).values()):
                if time.monotonic() > deadline:
                    break
                each()
                time.sleep(1)
            return job_states(env)

        told = run()
        numbers = dict(re.findall(r"^(\w+): job (\d+)", told, re.M))
        assert list(numbers) == ["teacher", "scores", "pruned", "random", "distilled"]
        seen: dict[str, set[str]] = {}

        def look(folder: Path = home / "run") -> dict[str, StageStatus]:
            with monkeypatch.context() as patched:
                patched.setenv("PATH", env["PATH"])
                patched.setenv("SLURM_CONF", env["SLURM_CONF"])
                stages = {stage.name: stage for stage in status_of(folder).stages}
            for stage in stages.values():
                seen.setdefault(stage.name, set()).add(stage.state)
            return stages

        first = look()
        assert {name: stage.job for name, stage in first.items()} == numbers
        assert first["distilled"].state == "queued"
        assert f"job {numbers['distilled']} is PENDING (Dependency)" in str(first["distilled"].process)
        states = wait(each=look)
        last = look()
        assert {stage.state for stage in last.values()} == {"done"}
        assert "running" in seen["distilled"] and "queued" in seen["scores"], seen
        logs = "\n".join(p.read_text()[-1500:] for p in (home / "run").rglob("log*.out"))
        assert set(states.values()) == {"COMPLETED"}, f"{states}\n{logs}"

        records = {name: read_record(home / "run" / name) for name in numbers}
        assert all(record is not None for record in records.values())
        assert records["distilled"]["metrics"]["steps"] == 2
        made = {name: json.dumps(record["started"]) for name, record in records.items() if record}
        assert made["teacher"] <= made["scores"] <= made["pruned"] <= made["distilled"]
        assert "every stage is done" in run()

        # The jobs of a search, each of its candidates' in the layout of its stage, and of an iteration. The last job of
        # the search is cancelled in the middle; the same command submits it again, and it waits for what runs.
        (home / "jobs.yaml").write_text(JOBS.format(home=home))
        submission = [*command[:4], str(home / "jobs.yaml"), *command[5:]]
        told = run(submission=submission)
        numbers = dict(re.findall(r"^([\w.-]+): job (\d+)", told, re.M))
        steps = [f"searched.{name}" for name in ("ranking", "1.student", "1.distilled", "1.measured")]
        assert list(numbers) == [*steps, "searched", "rounds.round-1", "rounds"]
        subprocess.run(["scancel", numbers["searched"]], env=env, check=True)
        told = run(submission=submission)
        again = dict(re.findall(r"^([\w.-]+): job (\d+)", told, re.M))
        assert list(again) == ["searched"] and f"searched.1.measured (job {numbers['searched.1.measured']})" in told
        states = wait(240)
        logs = "\n".join(p.read_text()[-1500:] for p in (home / "jobs").rglob("log*.out"))
        assert {states[number] for number in (again | {n: numbers[n] for n in steps}).values()} == {"COMPLETED"}, logs
        assert states[numbers["searched"]] == "CANCELLED"
        searched, rounds = (read_record(home / "jobs" / name) for name in ("searched", "rounds"))
        assert searched is not None and searched["metrics"]["distilled"] == 1
        assert rounds is not None and (rounds["metrics"]["resumed"], len(rounds["metrics"]["rounds"])) == (1, 2)
        assert "every stage is done" in run(submission=submission)

        # A stage in place, as nemo_run's executor starts a recipe: nobody but Slurm says which rank a process is. The
        # third has the teacher.
        in_place = IN_PLACE.format(home=home)
        done = subprocess.run(
            ["srun", "-n", "3", "--cpus-per-task=1", sys.executable, "-c", in_place],
            env={**env, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        record = read_record(home / "in_place")
        assert done.returncode == 0, done.stderr[-3000:]
        assert record is not None and record["config"]["parallel"]["tensor"] == 2
        assert record["metrics"]["last_kl"] == pytest.approx(records["distilled"]["metrics"]["last_kl"], rel=1e-5)

        # In a script of several tasks, without srun: a stage of one process, which is not one of those tasks.
        alone = f"{sys.executable} -m nemo_minitron distill {home}/alone.yaml"
        stage = load_pipeline(home / "pipeline.yaml", ["stages.distilled.parallel={tensor: 1}"])[1][-1]
        settings = {**dataclasses.asdict(stage), "output": str(home / "alone")}
        (home / "alone.yaml").write_text(yaml.safe_dump(settings))
        subprocess.run(
            ["sbatch", "--ntasks=4", f"--output={home}/alone.log", "--wrap", alone], env=env, check=True,
            capture_output=True,
        )  # fmt: skip
        wait(240)
        record = read_record(home / "alone")
        assert record is not None, (home / "alone.log").read_text()
        assert record["metrics"]["last_kl"] == pytest.approx(records["distilled"]["metrics"]["last_kl"], rel=1e-4)

        # A layout that the model does not have: refused by the stage, and not queued again.
        odd = ("stages.scores.parallel={pipeline: 2, tensor: 1}", "stages.scores.samples=9999",
               "stages.scores.output=" + str(home / "run" / "more"))  # fmt: skip
        run(*odd, f"stages.pruned.output={home}/run/less", f"stages.pruned.scores={home}/run/more")
        # What waited for it can never start, and leaves the queue.
        assert sorted(wait(180).values()).count("CANCELLED") >= 1
        assert not queue(env)
        ended = look()
        assert (ended["scores"].state, ended["scores"].exit_code) == ("failed", 2), ended["scores"]
        assert "is FAILED" in str(ended["scores"].error) and "9999" in str(ended["scores"].error)
        assert ended["pruned"].state == "cancelled"
        assert (ended["teacher"].state, look(home / "run" / "more")["scores"].state) == ("done", "failed")
        restarts = subprocess.run(
            ["scontrol", "show", "jobs", "-o"], env=env, capture_output=True, text=True, check=True
        ).stdout
        failed = [line for line in restarts.splitlines() if "JobState=FAILED" in line]
        assert len(failed) == 1
        assert "Restarts=0" in failed[0]
        assert read_record(home / "run" / "more") is None
    report = "\n".join(p.read_text() for p in (home / "run" / "logs" / "more").glob("rank-*.json"))
    assert '"status": "refused"' in report


def queue(env: dict[str, str]) -> str:
    """What Slurm says that jobs wait for."""
    return subprocess.run(["squeue", "-h", "-o", "%r"], env=env, capture_output=True, text=True, check=True).stdout
