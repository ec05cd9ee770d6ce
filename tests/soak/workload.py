"""What a soak test runs: pipelines over a tiny model that take seconds and write files of every kind.

``FULL`` trains (distillation, a fine-tuning with NeMo-Aligner), ``SHORT`` distils alone, ``CHEAP`` does not train.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from support.chats import SPECIAL, chat_checkpoint, chat_tokenizer, chats, write_jsonl

__all__ = ["CHEAP", "FULL", "SHORT", "Stages", "write_inputs", "write_pipeline"]

Stages = list[dict[str, Any]]

_TEXT: dict[str, Any] = {
    "sequence_length": 32,
    "calibration_fraction": 0.3,
    "held_out_fraction": 0.2,
    "cache_dir": "${output}/text",
    "sources": [{"name": "text", "path": "${vars.home}/text.jsonl"}],
}
_BEGIN: Stages = [
    {"stage": "import", "name": "teacher", "source": "${vars.home}/hf", "verify": False},
    {"stage": "tokens", "name": "tokens", "model": "${output}/teacher", "data": _TEXT, "blocks": 8},
]
_RANDOM = {
    "stage": "prune",
    "name": "random",
    "model": "${output}/teacher",
    "method": "random",
    "target": {"num_layers": 2, "ffn_hidden_size": 48},
}

#: Stages without training: an import, a table, a pruned model, an export, a report.
CHEAP: Stages = [
    *_BEGIN,
    _RANDOM,
    {"stage": "export", "name": "export", "model": "${output}/random", "formats": ["hf"], "verify": False},
    {"stage": "report", "name": "report"},
]

_TRAINED: dict[str, Any] = {
    "data": _TEXT,
    "steps": 6,
    "global_batch_size": 2,
    "lr": 1.0e-3,
    "warmup_steps": 0,
    "validate_every": 6,
    "validation_batches": 1,
    "save_every": 2,
}

#: A training that saves its state every other step, and what it needs.
SHORT: Stages = [
    _BEGIN[0],
    _RANDOM,
    {
        "stage": "distill",
        "name": "distilled",
        "student": "${output}/random",
        "teacher": "${output}/teacher",
        **_TRAINED,
    },
]

#: From the import to the report, with trainings that save their state every other step.
FULL: Stages = [
    *_BEGIN,
    {
        "stage": "score",
        "name": "scores",
        "model": "${output}/teacher",
        "data": _TEXT,
        "samples": 8,
        "micro_batch_size": 2,
    },
    {
        "stage": "prune",
        "name": "pruned",
        "model": "${output}/teacher",
        "scores": "${output}/scores",
        "target": {"num_layers": 2, "ffn_hidden_size": 48},
    },
    {
        "stage": "cache",
        "name": "logits",
        "teacher": "${output}/teacher",
        "data": _TEXT,
        "steps": 6,
        "global_batch_size": 2,
        "validation_batches": 1,
        "k": 16,
        "samples_per_shard": 4,
    },
    {
        "stage": "distill",
        "name": "distilled",
        "student": "${output}/pruned",
        "teacher": None,
        "teacher_cache": "${output}/logits",
        **_TRAINED,
    },
    {
        "stage": "sft",
        "name": "sft",
        "model": "${output}/distilled/model",
        "data": {"path": "${vars.home}/chats.jsonl", "template": "chatml", "max_length": 96},
        "steps": 4,
        "global_batch_size": 2,
        "lr": 1.0e-3,
        "warmup_steps": 0,
        "validate_every": 2,
        "save_every": 2,
        "formats": ["nemo2"],
    },
    {
        "stage": "evaluate",
        "name": "evaluation",
        "models": {"teacher": "${output}/teacher", "distilled": "${output}/distilled/model"},
        "baseline": "teacher",
        "tokens": 256,
        "data": _TEXT,
        "prompts": ["how many apples"],
        "max_new_tokens": 4,
    },
    {"stage": "export", "name": "export", "model": "${output}/sft/model", "formats": ["hf"], "verify": False},
    {"stage": "report", "name": "report"},
]


def write_inputs(home: Path) -> None:
    """The model, the text and the conversations that the pipelines read, into ``home``."""
    home.mkdir(parents=True, exist_ok=True)
    chat_checkpoint(home / "hf")
    chat_tokenizer(home / "hf", special=tuple(sorted(SPECIAL, key=lambda token: token != "<|im_end|>")))
    texts = [f"how many apples are {n} and {n + 1}? there are {2 * n + 1} apples, and {n} more." for n in range(200)]
    write_jsonl(home / "text.jsonl", [{"text": text} for text in texts])
    write_jsonl(home / "chats.jsonl", chats(24))


def write_pipeline(path: Path, home: Path, output: Path, stages: Stages) -> Path:
    """A pipeline's YAML; returns ``path``."""
    content = {
        "name": "soak",
        "output": str(output),
        "vars": {"home": str(home)},
        "defaults": {"runtime": {"threads": 1, "timeout_minutes": 10, "device": "cpu"}},
        "stages": stages,
    }
    path.write_text(yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False))
    return path
