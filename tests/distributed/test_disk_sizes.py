"""The disk space that plans state, against the bytes that real stages write."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.checkpoints import tiny_checkpoint
from support.text import write_jsonl

from nemo_minitron.config import load_pipeline
from nemo_minitron.jobs.dry_run import planned
from nemo_minitron.jobs.space import present_bytes

pytestmark = pytest.mark.slow

PIPELINE = """
name: sizes
output: {home}/run
defaults:
  runtime: {{threads: 1, device: cpu}}
  data:
    sources: [{{name: text, path: {home}/text.jsonl}}]
    sequence_length: 32
    calibration_fraction: 0.1
    held_out_fraction: 0.1
    cache_dir: {home}/cache
stages:
  - {{stage: import, name: teacher, source: {home}/hf, verify: false}}
  - {{stage: import, name: teacher16, source: {home}/hf, dtype: bfloat16, verify: false}}
  - {{stage: score, name: scores, model: "${{output}}/teacher", samples: 4, also: [{{batch: mean}}]}}
  - {{stage: prune, name: pruned, model: "${{output}}/teacher", scores: "${{output}}/scores",
     target: {{ffn_hidden_size: 384}}}}
  - {{stage: cache, name: cache, teacher: "${{output}}/teacher", steps: 60, global_batch_size: 4, validation_batches: 1,
     k: 64}}
  - {{stage: cache, name: whole, teacher: "${{output}}/teacher", steps: 20, global_batch_size: 4, validation_batches: 1,
     k: null, values: int8}}
  - {{stage: distill, name: distilled, student: "${{output}}/pruned", teacher: "${{output}}/teacher", steps: 6,
     global_batch_size: 2, warmup_steps: 0, validate_every: 3, validation_batches: 1, save_every: 1, keep_best: kl}}
  - {{stage: distill, name: mixed, student: "${{output}}/pruned", teacher: "${{output}}/teacher", steps: 6,
     global_batch_size: 2, warmup_steps: 0, validate_every: 3, validation_batches: 1, save_every: 1,
     precision: bf16-mixed, parallel: {{tensor: 2}}}}
  - {{stage: export, name: export, model: "${{output}}/distilled/model", formats: [hf, nemo2, nemo], verify: false}}
"""
#: Share that the bytes of tensors may be above what a plan states; of a training at its largest, below too.
WITHIN = 0.03
#: Bytes of a file around its tensors.
HEAD = 4096
TENSORS = (".distcp", ".safetensors", ".nemo")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("sizes")
    tiny_checkpoint(
        home / "hf", vocab_size=1024, hidden_size=192, intermediate_size=512, num_hidden_layers=4, head_dim=32
    )
    words = torch.randint(0, 1000, (800, 60), generator=torch.Generator().manual_seed(0)).tolist()
    write_jsonl(home / "text.jsonl", [" ".join(f"w{number}" for number in row) for row in words])
    (home / "pipeline.yaml").write_text(PIPELINE.format(home=home))
    return home


@pytest.mark.timeout(600)
def test_plans_state_what_stages_write(home: Path) -> None:
    """The tensors of every output, and the most that a training holds while it runs."""
    _, stages = load_pipeline(home / "pipeline.yaml")
    plans = {stage.name: stage.plan for stage in planned(stages)}
    command = [sys.executable, "-m", "nemo_minitron", "run", str(home / "pipeline.yaml")]
    with (home / "out.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        largest = dict.fromkeys(("distilled", "mixed"), 0.0)
        while process.poll() is None:
            for name in largest:
                largest[name] = max(largest[name], present_bytes(home / "run" / name))
            time.sleep(0.02)
    assert process.returncode == 0, (home / "out.log").read_text()
    seen = {}
    for name, plan in plans.items():
        assert plan is not None
        own = [need for need in plan.disk if Path(need.path).is_relative_to(home / "run")]
        files = [file for file in (home / "run" / name).rglob("*") if file.suffix in TENSORS]
        seen[name] = sum(need.staying for need in own), sum(file.stat().st_size for file in files), len(files)
    for name, (stated, written, files) in seen.items():
        assert 0 < stated <= written <= stated * (1 + WITHIN) + HEAD * files, (name, seen)
    for name, most in largest.items():
        plan = plans[name]
        assert plan is not None
        stated = sum(need.bytes for need in plan.disk if Path(need.path).is_relative_to(home / "run"))
        assert stated * (1 - WITHIN) <= most <= stated * (1 + WITHIN) + 200_000, (name, stated, most)
    blocks = sum(need.bytes for plan in plans.values() if plan for need in plan.disk if need.what == "token blocks")
    cached = [file.stat().st_size for file in (home / "cache" / "blocks").rglob("*.npy")]
    assert 0 < sum(cached) <= blocks + 256 * len(cached)
