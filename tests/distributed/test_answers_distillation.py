"""Sequence-level distillation end to end: the teacher answers, the student is trained on its answers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import tiny_checkpoint
from support.distributed import run_distributed

from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.config import GenerateConfig, PromptsConfig, Sampling, load
from nemo_minitron.stages import generate

TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> {% endif %}"
)


def answer(config: GenerateConfig) -> dict[str, Any]:
    return generate.run(config)


def train(paths: list[str]) -> list[dict[str, Any]]:
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

    from nemo_minitron.stages import distill

    found = []
    for path in paths:
        unset_num_microbatches_calculator()
        found.append(distill.run(load("distill", path)))  # type: ignore[arg-type]
    return found


@pytest.mark.slow
def test_a_student_learns_from_its_teachers_answers(tmp_path: Path) -> None:
    models = {
        "teacher": tiny_checkpoint(tmp_path / "teacher"),
        "student": tiny_checkpoint(tmp_path / "student", seed=8),
    }
    for path in models.values():
        settings = json.loads((path / "tokenizer_config.json").read_text())
        settings.pop("chat_template", None)
        (path / "chat_template.jinja").unlink(missing_ok=True)
        (path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    prompts = [f"w{number} w{number % 7} w{number % 3}" for number in range(40)]
    answered = GenerateConfig(
        model=str(models["teacher"]),
        prompts=PromptsConfig(texts=prompts),
        sampling=Sampling(max_new_tokens=16, temperature=0.7),
        samples=3,
        batch_size=16,
        output=str(tmp_path / "answers"),
    )
    assert run_distributed(answer, 1, tmp_path, config=answered)[0]["answers"] == 120
    config = {
        "teacher": str(models["teacher"]),
        "student": str(models["student"]),
        "output": str(tmp_path / "distilled"),
        "data": {
            "sources": [{"name": "answers", "chat": str(tmp_path / "answers" / "answers.jsonl")}],
            "sequence_length": 32,
            "documents": "mask",
            "packing": "best_fit",
            "held_out_fraction": 0.2,
            "cache_dir": str(tmp_path / "cache"),
        },
        "loss": {"label_weight": 0.5},
        "steps": 16,
        "global_batch_size": 4,
        "lr": 5e-3,
        "min_lr": 1e-3,
        "warmup_steps": 1,
        "validate_every": 8,
        "validation_batches": 1,
        "save_every": 16,
    }
    (tmp_path / "distill.yaml").write_text(json.dumps(config))
    own = {
        **config,
        "output": str(tmp_path / "own"),
        "loss": {"kind": "jensen_shannon"},
        "on_policy": {"share": 0.5, "prompts": {"texts": prompts}, "sampling": {"max_new_tokens": 8}, "refresh": 4},
    }
    (tmp_path / "own.yaml").write_text(json.dumps(own))
    run_distributed(train, 1, tmp_path, paths=[str(tmp_path / name) for name in ("distill.yaml", "own.yaml")])
    lines = [json.loads(line) for line in (tmp_path / "distilled" / "metrics.jsonl").read_text().splitlines()]
    checks = [line for line in lines if line.get("split") == "validation"]
    assert checks[-1]["lm_loss"] < checks[0]["lm_loss"]
    steps = [line for line in lines if line.get("split") != "validation"]
    assert len(steps) == 16
    assert steps[-1]["kl"] < 0.8 * steps[0]["kl"]
    assert steps[-1]["lm_loss"] < 0.8 * steps[0]["lm_loss"]
    answered_by_itself(tmp_path / "own")


def answered_by_itself(output: Path) -> None:
    """The stage trained the student on its own answers to the same prompts, and the model says so."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "split" not in line]
    assert len(steps) == 16
    assert all(line["own_share"] == 0.5 and 1 <= line["own_length"] <= 8 for line in steps)
    assert [line["own_age"] for line in steps] == [0, 1, 2, 3] * 4
    assert all(line["own_kl"] > 0 and line["data_kl"] > 0 for line in steps)
    assert steps[-1]["kl"] < 0.8 * steps[0]["kl"]
    lineage = open_checkpoint(output / "model").lineage["distilled"]
    assert lineage["on_policy"]["share"] == 0.5
