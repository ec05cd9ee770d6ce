"""Tasks of lm-evaluation-harness of the four kinds of requests, and what the harness's own model makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

__all__ = ["TASKS", "live_model", "same_metrics", "with_transformers", "write_tasks"]

TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "fewshot_split": "test",
        "num_fewshot": 1,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{choices[1]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "whole_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "question": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["w7", " w50"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def words(count: int, generator: torch.Generator) -> str:
    return " ".join(f"w{number}" for number in torch.randint(0, 125, (count,), generator=generator).tolist())


def write_tasks(folder: Path, *, count: int = 9) -> Path:
    """Four tasks of the four kinds of requests, over one local file; texts pass the model's context of 64."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(4)
    documents = [
        {
            "question": words(3 + number % 5, generator),
            "choices": [words(1 + one, generator) for one in range(3)],
            "answer": number % 3,
            "text": words(4 + 40 * (number % 4), generator),
        }
        for number in range(count)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, task in TASKS.items():
        config = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "metadata": {"version": 1.0},
            **task,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(config))
    return folder


def live_model(path: str | Path, groups: Any, *, max_length: int, batch_size: int) -> Any:
    """The harness's model over a checkpoint that is loaded into a Megatron one."""
    from nemo_minitron.checkpoints import load_into, open_checkpoint
    from nemo_minitron.data import load_tokenizer
    from nemo_minitron.evaluation.harness import MegatronLM
    from nemo_minitron.runtime.model import build_model

    checkpoint = open_checkpoint(path)
    chunks = build_model(checkpoint.shape, checkpoint.architecture, groups)
    load_into(chunks, checkpoint, groups)
    return MegatronLM(
        chunks, groups, load_tokenizer(checkpoint.tokenizer),
        vocab_size=checkpoint.shape.vocab_size, max_length=max_length, batch_size=batch_size,
    )  # fmt: skip


def with_transformers(path: str, tasks: str, *, max_length: int) -> tuple[Any, dict[str, Any]]:
    """The harness's ``HFLM`` of a HF directory, and its results."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=path, dtype="float32", device="cpu", batch_size=1, max_length=max_length)
    found = simple_evaluate(
        model, tasks=list(TASKS), task_manager=TaskManager(include_path=tasks, include_defaults=False),
        bootstrap_iters=1000, log_samples=False, random_seed=1234, numpy_random_seed=1234, torch_random_seed=1234,
        fewshot_random_seed=1234,
    )  # fmt: skip
    return model, found["results"]


def same_metrics(results: dict[str, Any], expected: dict[str, Any], *, count: int = 9) -> None:
    for task, result in results.items():
        metrics = {key.removesuffix(",none"): value for key, value in expected[task].items()}
        assert result["metrics"], task
        for metric, value in result["metrics"].items():
            assert value == pytest.approx(metrics[metric], rel=1e-4), (task, metric)
        assert result["samples"] == count
