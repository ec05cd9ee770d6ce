"""The main job on a tiny model, from import to report: what every environment that is claimed to work has to pass.

``pytest -m smoke`` runs it alone; CI does so in a second environment, ``make matrix`` in one for each pair of versions.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chats import chat_checkpoint, chats, preferences, write_jsonl

from nemo_minitron.config import load
from nemo_minitron.stages import evaluate

pytestmark = [pytest.mark.smoke, pytest.mark.slow, pytest.mark.timeout(1500)]

PIPELINE = """
name: smoke
output: {home}/run
defaults:
  runtime: {{threads: 1, timeout_minutes: 10}}
stages:
  - {{stage: import, name: teacher, source: {home}/hf}}
  - {{stage: score, name: scores, model: "${{output}}/teacher", samples: 8, micro_batch_size: 2, data: &text
      {{sequence_length: 32, calibration_fraction: 0.3, held_out_fraction: 0.2, cache_dir: {home}/cache,
       sources: [{{name: text, path: {home}/text.jsonl}}]}}}}
  - {{stage: prune, name: pruned, model: "${{output}}/teacher", scores: "${{output}}/scores",
      target: {{num_layers: 2, ffn_hidden_size: 48}}}}
  - &distill
    stage: distill
    name: distilled
    student: "${{output}}/pruned"
    teacher: "${{output}}/teacher"
    data: *text
    steps: 4
    global_batch_size: 2
    lr: 1.0e-3
    warmup_steps: 0
    validate_every: 4
    validation_batches: 1
    save_every: 2
  - {{<<: *distill, name: distilled_tp2, parallel: {{tensor: 2}}}}
  - &align
    stage: sft
    name: sft
    model: "${{output}}/distilled/model"
    data: &chats {{path: {home}/chats.jsonl, template: chatml, max_length: 96}}
    steps: 2
    global_batch_size: 2
    lr: 1.0e-3
    warmup_steps: 0
    validate_every: 2
    save_every: 2
    formats: [nemo2]
  - {{<<: *align, stage: dpo, name: dpo, model: "${{output}}/sft/model",
      data: {{<<: *chats, path: {home}/pairs.jsonl}}}}
  - stage: evaluate
    name: evaluation
    models: {{teacher: "${{output}}/teacher", distilled: "${{output}}/distilled/model", sft: "${{output}}/sft/model"}}
    baseline: teacher
    tokens: 512
    data: *text
    prompts: [how many apples]
    max_new_tokens: 4
  - {{stage: export, name: export, model: "${{output}}/dpo/model", formats: [hf]}}
  - {{stage: report}}
"""


def losses(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_the_main_job(tmp_path: Path) -> None:
    chat_checkpoint(tmp_path / "hf")
    texts = [f"how many apples are {n} and {n + 1}? there are {2 * n + 1} apples, and {n} more." for n in range(400)]
    write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in texts])
    write_jsonl(tmp_path / "chats.jsonl", chats(24))
    write_jsonl(tmp_path / "pairs.jsonl", preferences(24))
    pipeline = tmp_path / "smoke.yaml"
    pipeline.write_text(PIPELINE.format(home=tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "nemo_minitron", "run", str(pipeline)],
        cwd=tmp_path, capture_output=True, text=True, timeout=1400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    run = tmp_path / "run"

    plain, parallel = losses(run / "distilled"), losses(run / "distilled_tp2")
    assert len(plain) == len(parallel) == 5, "four steps and a validation"
    for one, two in zip(plain, parallel, strict=True):
        assert one["kl"] == pytest.approx(two["kl"], rel=1e-4), (one, two)
    assert all(0 < row["kl"] < 10 for row in plain)

    models = json.loads((run / "evaluation/evaluation.json").read_text())["models"]
    assert set(models) == {"teacher", "distilled", "sft"}
    assert all(math.isfinite(model["loss"]) for model in models.values())

    # Alignment gives its model another end token and a chat template; losses stay comparable, in one line of warning.
    (warning,) = re.findall(r"have one tokenizer but for .*", (run / "logs/evaluation/rank-0.log").read_text())
    assert re.fullmatch(r".* chat templates \(none of model 'teacher'\); eos_token_id is 0 .* and 2 .*", warning)
    plan = evaluate.plan(load("evaluate", run / "logs/evaluation/config.yaml"))
    assert [note.partition(" have ")[2] for note in plan.notes if "one tokenizer" in note] == [warning[5:]]
    assert plan.faults == []

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "export/hf")
    model = AutoModelForCausalLM.from_pretrained(run / "export/hf")
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (2, 48)
    prompt = tokenizer("how many apples", return_tensors="pt")["input_ids"]
    assert model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0).shape[1] > prompt.shape[1]
    assert torch.isfinite(model(prompt).logits).all()
    assert (run / "report/index.html").is_file()
