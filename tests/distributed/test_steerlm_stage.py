"""The stage that leads the others: the attribute model, its labels, the fine-tuning, with a kill in between."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from support.chats import write_jsonl
from support.steering import labelled_rows, tiny_chat_model

from nemo_minitron.checkpoints import open_checkpoint


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """A process and all below it, at once, as when the machine goes."""
    for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        member.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_steerlm_goes_on_with_what_is_done(tmp_path: Path) -> None:
    out = tmp_path / "steerlm"
    schedule = {
        "steps": 3, "global_batch_size": 4, "warmup_steps": 1, "validate_every": 3, "save_every": 3, "lr": 1e-3,
        "min_lr": 1e-4,
    }  # fmt: skip
    config = {
        "model": tiny_chat_model(tmp_path / "hf"),
        "output": str(out),
        "data": {
            "path": str(write_jsonl(tmp_path / "chats.jsonl", labelled_rows(24))),
            "template": "chatml", "max_length": 120, "held_out_fraction": 0.2,
        },
        "reward": {**schedule, "lr": 1e-2, "min_lr": 1e-3},
        "verify": False,
        **schedule,
    }  # fmt: skip
    (tmp_path / "steerlm.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "nemo_minitron", "steerlm", str(tmp_path / "steerlm.yaml")]
    with (tmp_path / "first.log").open("wb") as log:
        first = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        deadline = time.monotonic() + 300
        while not (out / "attribute_model" / "record.json").exists():
            assert first.poll() is None, (tmp_path / "first.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        kill_all(first)
    made = (out / "attribute_model" / "record.json").stat().st_mtime_ns
    assert not (out / "record.json").exists()
    assert not (out / "labels" / "record.json").exists()

    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (out / "attribute_model" / "record.json").stat().st_mtime_ns == made, "it is kept"
    record = json.loads((out / "record.json").read_text())
    metrics = record["metrics"]
    assert metrics["reward"]["attributes"].keys() == {"verbosity"}
    assert metrics["reward"]["steps"] == metrics["sft"]["steps"] == 3
    assert metrics["labels"]["conversations"] == metrics["sft"]["samples"] + metrics["sft"]["held_out"] == 24
    # What was trained on are the answers behind the values that the attribute model gave them.
    lines = [json.loads(line) for line in (out / "labels" / "labelled.jsonl").read_text().splitlines()]
    assert {*(line["attributes"]["verbosity"] for line in lines)} <= {0, 1, 2, 3, 4}
    sft = json.loads((out / "sft" / "record.json").read_text())
    assert sft["config"]["data"]["path"] == str(out / "labels" / "labelled.jsonl")
    assert sft["config"]["data"]["labelled"] is True
    assert open_checkpoint(out / "sft" / "model").lineage["sft"]["steps"] == 3
