"""``minitron doctor --run``: it holds on this machine, and it says so where it does not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from support.slurm import job_states, missing, slurm

from nemo_minitron.config import DOCTOR_CHECKS, DoctorConfig, load_doctor
from nemo_minitron.doctor.checks import CHECKS
from nemo_minitron.doctor.prove import references

TESTS = Path(__file__).resolve().parents[1]
FAULTS = TESTS / "support" / "doctor_faults"
CORE = "checks=[allreduce,forward,kl,score,prune,convert]"


def doctor(folder: Path, *words: str, faults: str = "") -> tuple[int, str, dict[str, Any]]:
    """Exit code, output and ``doctor.json``."""
    env = {**os.environ, "COLUMNS": "200"}
    if faults:
        env |= {"DOCTOR_FAULTS": faults, "PYTHONPATH": str(FAULTS)}
    command = [sys.executable, "-m", "nemo_minitron", "doctor", "--run", "output=found", *words]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=560, check=False)
    path = folder / "found" / "doctor.json"
    text = done.stdout + done.stderr
    assert path.exists(), text
    return done.returncode, text, json.loads(path.read_text())


def failed(found: dict[str, Any]) -> set[str]:
    return {row["check"] for row in found["rows"] if row["status"] == "failed"}


def passed(found: dict[str, Any]) -> set[str]:
    return {row["check"] for row in found["rows"] if row["status"] == "passed"} - failed(found)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_check_holds_on_two_ranks(tmp_path: Path) -> None:
    code, text, found = doctor(tmp_path, "parallel.tensor=2")
    assert code == 0, text
    assert passed(found) == set(DOCTOR_CHECKS)
    for row in found["rows"]:
        assert row["difference"] <= row["tolerance"]
    assert {(row["check"], row["precision"]) for row in found["rows"]} == {
        (check, precision) for check in DOCTOR_CHECKS for precision in ("float32", "bfloat16")
    }
    assert {(one["group"], one["ranks"]) for one in found["bandwidth"]} == {("world", 2)}
    assert all(one["bus_gb_per_s"] > 0 for one in found["bandwidth"])
    assert found["device"] == "cpu"
    assert json.loads((tmp_path / "found" / "record.json").read_text())["metrics"]["device"] == "cpu"
    assert not (tmp_path / "logs" / "found" / "work").exists(), "what the checks wrote is gone"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_pipeline_and_again_into_the_same_output(tmp_path: Path) -> None:
    for number in range(2):
        code, text, found = doctor(
            tmp_path, "parallel.pipeline=2", "precision=[float32]", "checks=[forward,prune]", f"runtime.seed={number}"
        )
        assert code == 0, text
        assert passed(found) == {"forward", "prune"}
        assert found["layout"]["pipeline"] == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wrong_numbers_fail(tmp_path: Path) -> None:
    code, text, found = doctor(tmp_path, "precision=[float32]", faults="weights gradient resume")
    assert code == 1, text
    assert failed(found) == set(DOCTOR_CHECKS) - {"allreduce"}
    assert found["passed"] is False
    wrong = {(row["check"], row["quantity"]) for row in found["rows"] if row["status"] == "failed"}
    assert {("kl", "gradient"), ("distill", "grad_norm"), ("distill", "update"), ("sft", "loss")} <= wrong
    assert ("kl", "kl") not in wrong
    assert "Traceback" not in text
    assert "minitron: failed on this machine: forward (float32), kl (float32)" in text
    assert not (tmp_path / "found" / "record.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_does_not_happen_dies_or_hangs_fails_and_the_others_run(tmp_path: Path) -> None:
    code, text, found = doctor(
        tmp_path,
        "parallel.tensor=2",
        "precision=[float32]",
        CORE,
        "minutes=1",
        faults="dropped killed hanging",
    )
    assert code == 1, text
    assert failed(found) == {"allreduce", "score", "prune"}
    assert passed(found) == {"forward", "kl", "convert"}
    reasons = {row["check"]: row["reason"] for row in found["rows"] if row["status"] == "failed"}
    assert "differs" in reasons["allreduce"]
    assert "rank 1: was killed by SIGKILL" in reasons["score"]
    assert "did not end in time (minutes=1)" in reasons["prune"]


@pytest.mark.slow
def test_a_training_that_begins_anew_is_noticed(tmp_path: Path) -> None:
    code, text, found = doctor(tmp_path, "precision=[float32]", "checks=[distill]", faults="resume")
    assert code == 1, text
    assert failed(found) == {"distill"}


@pytest.mark.slow
def test_script_for_slurm(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("account: me\ngpus_per_node: 4\ntime: '00:20:00'\n")
    command = [sys.executable, "-m", "nemo_minitron", "doctor", "--run", "--slurm", "cluster.yaml", "--dry-run"]
    done = subprocess.run(
        [*command, "parallel.tensor=8"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    for line in ("#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=4", "nemo_minitron.jobs.slurm_rank"):
        assert line in done.stdout
    assert f"{tmp_path}/logs/doctor" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["cluster.yaml"], "a dry run leaves nothing behind"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(bool(missing()), reason=f"Slurm is not installed: {', '.join(missing())} missing")
def test_a_real_slurm_runs_it_each_time() -> None:
    home = Path(tempfile.mkdtemp(prefix="mt", dir="/tmp"))  # pytest's own path is too long for munge's socket
    (home / "cluster.yaml").write_text(
        f"account: test\ngpus_per_node: 0\ntasks_per_node: 2\ntime: '00:20:00'\nsignal: null\nretries: 0\n"
        f"python: {sys.executable}\n"
    )
    command = [sys.executable, "-m", "nemo_minitron", "doctor", "--run", "--slurm", "cluster.yaml", "parallel.tensor=2"]
    settings = ["precision=[float32]", "checks=[forward]", "runtime.threads=1", f"output={home}/found"]
    made = []
    try:
        with slurm(home / "slurm") as env:
            for _ in range(2):
                done = subprocess.run(
                    [*command, *settings], cwd=home, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                    timeout=120, check=False,
                )  # fmt: skip
                assert done.returncode == 0, done.stderr
                assert "doctor: job" in done.stdout
                deadline = time.monotonic() + 240
                while set(job_states(env).values()) & {"PENDING", "RUNNING", "COMPLETING"}:
                    assert time.monotonic() < deadline
                    time.sleep(1)
                logs = "\n".join(path.read_text()[-2000:] for path in (home / "logs").rglob("*.*o*") if path.is_file())
                assert set(job_states(env).values()) == {"COMPLETED"}, logs
                found = json.loads((home / "found" / "doctor.json").read_text())
                assert passed(found) == {"forward"}
                made.append(found["seconds"])
    finally:
        shutil.rmtree(home, ignore_errors=True)
    assert len(set(made)) == 2, "the second job made it anew"


@pytest.mark.slow
def test_references_for_the_tests_on_a_gpu(tmp_path: Path) -> None:
    found = references(["forward", "kl"], tmp_path, DoctorConfig())
    assert set(found) == {"forward", "kl"}
    for name, values in found.items():
        assert set(values) == set(CHECKS[name].quantities)


def test_settings(tmp_path: Path) -> None:
    assert tuple(CHECKS) == DOCTOR_CHECKS
    assert load_doctor(["parallel.tensor=4", "checks=[kl]"]).chosen == ("kl",)
    path = tmp_path / "mine.yaml"
    path.write_text("precision: [bfloat16]\n")
    assert load_doctor([str(path), "minutes=1"]).precision == ["bfloat16"]
