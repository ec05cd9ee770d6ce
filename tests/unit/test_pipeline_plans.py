"""Plans of a pipeline whose models are not there yet: they have the tokenizers of the models that they are made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.checkpoints import tiny_checkpoint

from nemo_minitron.config import load_pipeline
from nemo_minitron.jobs.dry_run import plan_faults, planned

PIPELINE = """
name: p
output: {home}/run
defaults:
  data: {{sources: [{{name: text, path: {home}/text.jsonl}}], sequence_length: 16, cache_dir: {home}/cache}}
stages:
  - {{stage: import, name: teacher, source: {home}/hf, verify: false}}
  - {{stage: prune, name: pruned, model: "${{output}}/teacher", method: random, target: {{num_layers: 2}}}}
  - {{stage: distill, name: distilled, student: "${{output}}/pruned", teacher: "${{output}}/teacher", steps: 20}}
  - stage: evaluate
    models: {{teacher: "${{output}}/teacher", distilled: "${{output}}/distilled/model", other: {home}/other}}
    tokens: 64
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name in ("hf", "other"):
        tiny_checkpoint(tmp_path / name)
    (tmp_path / "text.jsonl").write_text('{"text": "w1 w2 w3"}\n')
    (tmp_path / "pipe.yaml").write_text(PIPELINE.format(home=tmp_path))
    return tmp_path


def swap(home: Path) -> None:
    """Exchange the ids of two words in the tokenizer of the other model."""
    path = home / "other" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["w5"], vocab["w6"] = vocab["w6"], vocab["w5"]
    path.write_text(json.dumps(content))


def test_models_of_one_tokenizer(home):
    _, stages = load_pipeline(home / "pipe.yaml")
    assert plan_faults(stages) == []
    notes = [note for stage in planned(stages) if stage.plan for note in stage.plan.notes]
    assert not any("tokenizer" in note for note in notes)


def test_another_tokenizer_is_a_fault_before_anything_runs(home):
    swap(home)
    _, stages = load_pipeline(home / "pipe.yaml")
    ((name, fault),) = plan_faults(stages)
    assert name == "evaluate"
    assert "other" in fault and "teacher" in fault and "w5" in fault


def test_a_model_that_an_earlier_stage_makes_is_compared_too(home):
    swap(home)
    text = (home / "pipe.yaml").read_text().replace(f"other: {home}/other", f"first: {home}/hf")
    (home / "pipe.yaml").write_text(text.replace(f"source: {home}/hf", f"source: {home}/other"))
    _, stages = load_pipeline(home / "pipe.yaml")
    ((name, fault),) = plan_faults(stages)
    assert name == "evaluate" and "'first'" in fault


def test_a_trimmed_vocabulary_is_not_known_yet(home):
    (home / "counts.tsv").write_text("".join(f"{number}\t{200 - number}\n" for number in range(131)))
    _, stages = load_pipeline(
        home / "pipe.yaml", ["stages.pruned.vocabulary={size: 100, frequencies: " + str(home / "counts.tsv") + "}"]
    )
    assert plan_faults(stages) == []
    shapes = {path: made.shape for stage in planned(stages) if stage.plan for path, made in stage.plan.makes.items()}
    assert shapes[f"{home}/run/distilled/model"].vocab_size == 100
