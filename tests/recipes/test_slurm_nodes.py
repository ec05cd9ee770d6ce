"""A pipeline over several Slurm nodes: whole, with a node drained, with one that dies, with one that hangs.

The nodes are namespaces of this host (:mod:`support.slurm_nodes`); scores and losses are those of one process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.checkpoints import tiny_checkpoint
from support.slurm_nodes import Cluster, slurm_nodes, why_not
from support.text import write_jsonl

from nemo_minitron.jobs.records import read_record

STEPS, EVERY = 160, 15
PIPELINE = f"""
name: tiny
output: {{home}}/run
defaults:
  runtime: {{{{threads: 1}}}}
  data:
    sources: [{{{{name: text, path: {{home}}/text.jsonl}}}}]
    sequence_length: 16
    calibration_fraction: 0.3
    held_out_fraction: 0.2
    cache_dir: {{home}}/cache
stages:
  - {{{{stage: import, name: teacher, source: {{home}}/hf}}}}
  - {{{{stage: score, name: scores, model: "${{{{output}}}}/teacher", samples: 8, parallel: {{{{pipeline: 2}}}}}}}}
  - {{{{stage: prune, name: pruned, model: "${{{{output}}}}/teacher", scores: "${{{{output}}}}/scores",
     target: {{{{ffn_hidden_size: 48}}}}}}}}
  - stage: distill
    name: distilled
    student: ${{{{output}}}}/pruned
    teacher: ${{{{output}}}}/teacher
    steps: {STEPS}
    global_batch_size: 2
    warmup_steps: 5
    save_every: {EVERY}
    validate_every: {STEPS}
    validation_batches: 1
    parallel: {{{{pipeline: 2}}}}
"""
#: One process in the place of two.
ALONE = ("stages.scores.parallel={pipeline: 1}", "stages.distilled.parallel={pipeline: 1}")
#: Two processes on each of two nodes: tensor parallelism within a node, the pipeline over both.
WIDE = (
    "stages.scores.parallel={tensor: 2, pipeline: 2}",
    "stages.distilled.parallel={tensor: 2, pipeline: 2}",
    "stages.distilled.runtime={threads: 1, collective_timeout_minutes: 0.6}",
)


@pytest.fixture
def home() -> Iterator[Path]:
    """A tiny model and its text. (Not pytest's own directory, whose path is too long for a socket.)"""
    folder = Path(tempfile.mkdtemp(prefix="mt", dir="/tmp"))
    tiny_checkpoint(folder / "hf", num_hidden_layers=4)
    words = torch.randint(0, 125, (800, 30), generator=torch.Generator().manual_seed(0)).tolist()
    write_jsonl(folder / "text.jsonl", [" ".join(f"w{number}" for number in row) for row in words])
    (folder / "pipeline.yaml").write_text(PIPELINE.format(home=folder))
    for name, tasks in (("narrow", 1), ("wide", 2)):
        settings = {"account": "test", "gpus_per_node": 0, "tasks_per_node": tasks, "time": "00:20:00",
                    "signal": None, "python": sys.executable, "retries": 5}  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def losses(run: Path) -> dict[int, float]:
    """Of each step of a training; a step that was trained again counts as it was then."""
    lines = [json.loads(line) for line in (run / "distilled" / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["kl"] for line in lines if "split" not in line}


def steps(run: Path) -> int:
    """How far a training is."""
    with suppress(OSError, json.JSONDecodeError):
        return max(losses(run), default=0)
    return 0


def ranks(home: Path) -> str:
    """The ends of the ranks' logs, and what became of them."""
    files = sorted([*home.rglob("logs/*/rank-*"), *home.rglob("log-minitron*.out")])
    return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-1000:]}" for path in files)


def same_losses(run: Path, one: Path) -> None:
    """All steps were trained, and lost what they lose in one process."""
    found, expected = losses(run), losses(one)
    assert list(expected) == list(range(1, STEPS + 1)) == sorted(found)
    torch.testing.assert_close(
        torch.tensor([found[step] for step in expected]), torch.tensor(list(expected.values())), rtol=1e-5, atol=1e-5
    )


def same_scores(run: Path, one: Path) -> None:
    for path in (one / "scores").glob("*.safetensors"):
        expected, found = load_file(path), load_file(run / "scores" / path.name)
        assert expected.keys() == found.keys() and expected
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def freeze_ranks(cluster: Cluster, node: str, folder: Path) -> None:
    """Stop the ranks of a job on a node; its daemon goes on and sees nothing wrong."""
    stopped = 0
    for pid in cluster.nodes[node].pids():
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"nemo_minitron.jobs.slurm_rank" in words and os.fsencode(folder) in words:
                os.kill(pid, signal.SIGSTOP)
                stopped += 1
    assert stopped == 2, f"{stopped} ranks run on {node}"


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_a_pipeline_over_several_nodes(home: Path) -> None:
    one, run, wide = home / "one", home / "run", home / "wide"
    minitron = [sys.executable, "-m", "nemo_minitron", "run", str(home / "pipeline.yaml")]
    alone = subprocess.Popen(
        [*minitron, f"output={one}", *ALONE], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        with slurm_nodes(home / "slurm", ["mta", "mtb", "mtc"]) as cluster:
            cluster.update("mtc", "drain")

            def submit(kind: str, *overrides: str) -> dict[str, str]:
                told = cluster.run(*minitron, "--slurm", str(home / f"{kind}.yaml"), *overrides)
                return dict(re.findall(r"^(\w+): job (\d+)", told, re.M))

            def states(jobs: dict[str, str]) -> set[str]:
                found = {name: cluster.job(number)["JobState"] for name, number in jobs.items()}
                bad = {name: state for name, state in found.items() if state in ("FAILED", "CANCELLED", "TIMEOUT")}
                assert not bad, f"{bad}\n{ranks(home)}"
                return set(found.values())

            def reach(jobs: dict[str, str], output: Path, step: int) -> None:
                cluster.wait(f"step {step}", lambda: states(jobs) and steps(output) >= step, 600)

            def finish(jobs: dict[str, str]) -> None:
                cluster.wait(f"end of {jobs}", lambda: states(jobs) == {"COMPLETED"}, 600)

            def nodes_of(number: str) -> list[str]:
                return cluster.run("scontrol", "show", "hostnames", cluster.job(number)["NodeList"]).split()

            def down(node: str) -> None:
                cluster.wait(f"end of {node}", lambda: cluster.state(node).startswith("down"), 90)

            def again(number: str, restarts: int) -> list[str]:
                """Wait until a job that lost a node runs again, without Slurm's two minutes of patience; its nodes."""
                pending: list[float] = []

                def started() -> list[str]:
                    job = cluster.job(number)
                    if int(job["Restarts"]) < restarts:
                        return []
                    if job["JobState"] == "PENDING":
                        pending.append(time.monotonic())
                        # A node refuses, for some seconds, a job that it has just cleaned up ("credential revoked").
                        if pending[-1] - pending[0] > 8:
                            cluster.run("scontrol", "update", f"JobId={number}", "StartTime=now", check=False)
                    return nodes_of(number) if job["JobState"] == "RUNNING" else []

                found: list[str] = cluster.wait(f"restart {restarts} of job {number}", started, 180)
                return found

            jobs = submit("narrow")
            assert list(jobs) == ["teacher", "scores", "pruned", "distilled"]
            training = jobs["distilled"]
            reach(jobs, run, EVERY + 1)
            assert nodes_of(training) == ["mta", "mtb"], "mtc is drained"

            # A node dies. The job goes on from its checkpoint on the two others.
            cluster.update("mtc", "resume")
            cluster.kill("mtb")
            down("mtb")
            assert again(training, 1) == ["mta", "mtc"]
            cluster.start("mtb")
            reached = steps(run)
            assert reached < STEPS
            reach(jobs, run, reached + 1)

            # A node hangs, its daemon with it. Slurm gives it up, and the job goes on without it.
            cluster.freeze("mtc")
            down("mtc")
            assert again(training, 2) == ["mta", "mtb"]
            finish(jobs)
            cluster.thaw("mtc")
            assert alone.wait(120) == 0, alone.communicate()[0]
            same_scores(run, one)
            same_losses(run, one)
            assert read_record(run / "distilled") is not None

            # Four processes; in the middle the ranks of one node hang, which the node itself does not notice.
            shutil.copytree(run / "teacher", wide / "teacher")  # done already
            jobs = submit("wide", f"output={wide}", *WIDE)
            training = jobs["distilled"]
            reach(jobs, wide, EVERY + 1)
            _, second = nodes_of(training)
            freeze_ranks(cluster, second, wide / "logs" / "distilled")
            again(training, 1)
            finish(jobs)
            same_scores(wide, one)
            same_losses(wide, one)
    finally:
        alone.kill()
        alone.wait()
