"""The shipped demonstration, in its quick form, on the real model: what it leaves and what its report claims."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.harness import TASKS, live_model, same_metrics, with_transformers, write_tasks
from support.pruning import one_process

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_quick_demo(tmp_path: Path) -> None:
    """Scored pruning beats random pruning, reconstruction wins back a part without training, distillation from there;
    transformers generates with the result.
    """
    run = tmp_path / "demo"
    command = [
        sys.executable, "-m", "nemo_minitron", "run", str(ROOT / "configs/demo-quick.yaml"), f"output={run}",
        "defaults.runtime.threads=1",  # other tests have the other cores
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1100, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    models = json.loads((run / "evaluation/evaluation.json").read_text())["models"]
    loss = {name: model["loss"] for name, model in models.items()}
    assert loss["teacher"] < 4.0
    assert loss["teacher"] < loss["pruned"] < loss["teacher"] + 2.0
    assert loss["random"] > loss["pruned"] + 3.0
    untrained = (loss["pruned"] - loss["reconstructed"]) / (loss["pruned"] - loss["teacher"])
    assert untrained > 0.15, loss
    recovered = (loss["pruned"] - loss["distilled"]) / (loss["pruned"] - loss["teacher"])
    assert recovered > 0.15, loss

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "export/hf")
    model = AutoModelForCausalLM.from_pretrained(run / "export/hf")
    assert sum(p.numel() for p in model.parameters()) == 93_372_480
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert model.generate(prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt.shape[1]

    harness_sees_one_model(run, tmp_path)

    page = (run / "report/index.html").read_text()
    for claim in ("Held-out loss", "data:image/png;base64", f"{loss['distilled']:.3f}", "Reconstruction, without any"):
        assert claim in page
    assert (run / "report/report.md").is_file()

    damage_is_seen(run, command)


def damage_is_seen(run: Path, command: list[str]) -> None:
    """A flipped bit is named by ``verify`` and by the stage that reads it; a lost file is made again, and no other."""
    minitron = command[:3]

    def done(*words: str) -> tuple[int, str, str]:
        result = subprocess.run(
            words,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
            env={**os.environ, "COLUMNS": "400"},
        )
        return result.returncode, result.stdout, result.stderr

    code, out, err = done(*minitron, "verify", str(run))
    assert (code, err) == (0, ""), err
    assert f"distill  {run}/distilled: " in out
    assert f"checkpoint  {run}/distilled/checkpoints/" in out

    chunk = max((run / "distilled/model/weights").glob("*.distcp"), key=lambda file: file.stat().st_size)
    place = chunk.stat().st_size // 2
    flip(chunk, place)
    code, _, err = done(*minitron, "verify", str(run))
    assert code == 2
    assert f"{chunk} is damaged" in err
    export = ("export", "configs/export.yaml", f"model={run}/distilled/model", f"output={run}/again")
    code, _, err = done(*minitron, *export)
    assert code == 2
    assert f"{chunk}, tensor " in err and "the stored chunk is damaged" in err
    flip(chunk, place)

    chunk.unlink()
    code, _, err = done(*minitron, *export)
    assert (code, f"model: {chunk} is gone" in err) == (2, True), err
    before = steps_of(run)
    code, out, err = done(*command)
    assert code == 0, err
    assert f"distilled: made again, as {chunk} is gone" in out
    # from its last checkpoint; if there was time left, it went on, and what was made from the model is made again
    after = steps_of(run)
    assert after[: len(before)] == before
    assert ("1 made" if after == before else "4 made") in out
    assert not (run / "distilled/previous").exists()
    code, _, err = done(*minitron, "verify", str(run))
    assert (code, err) == (0, ""), err


def steps_of(run: Path) -> list[str]:
    """The lines of the distillation's steps."""
    return [line for line in (run / "distilled/metrics.jsonl").read_text().splitlines() if '"split"' not in line]


def flip(file: Path, place: int) -> None:
    """Flip a bit of the byte at ``place``."""
    with file.open("r+b") as stream:
        stream.seek(place)
        (byte,) = stream.read(1)
        stream.seek(place)
        stream.write(bytes([byte ^ 4]))


def harness_sees_one_model(run: Path, folder: Path) -> None:
    """lm-evaluation-harness on the live Megatron model gets what it gets from the export with plain transformers."""
    from nemo_minitron.evaluation.harness import run_tasks

    tasks = str(write_tasks(folder / "tasks", count=3))
    with one_process() as groups:
        live = live_model(run / "distilled/model", groups, max_length=512, batch_size=4)
        found = run_tasks(live, list(TASKS), include_path=tasks)
    assert set(found) == set(TASKS)
    same_metrics(found, with_transformers(str(run / "export/hf"), tasks, max_length=512)[1], count=3)
