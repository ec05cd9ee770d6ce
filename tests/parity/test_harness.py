"""lm-evaluation-harness on a live Megatron model: what the harness gets from transformers, in any layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import tiny_checkpoint
from support.distributed import run_distributed

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


def write_tasks(folder: Path) -> Path:
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
        for number in range(9)
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


def answers(model: Any) -> dict[str, list[Any]]:
    """What a harness model says to requests whose answers the metrics would blur."""
    from lm_eval.api.instance import Instance

    def ask(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
        return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]

    contexts = ["w1 w2 w3", "w9", "w4 " * 70, "w5 w6"]
    greedy = {"until": ["w7", " w50"], "max_gen_toks": 12, "do_sample": False}
    return {
        "scores": model.loglikelihood(ask("loglikelihood", [(one, " w8 w9") for one in contexts] + [("", "w3 w4")])),
        "rolling": model.loglikelihood_rolling(ask("loglikelihood_rolling", [(one + " w2",) for one in contexts])),
        "texts": model.generate_until(ask("generate_until", [(one, greedy) for one in contexts])),
    }


def evaluate(path: str, layouts: list[dict[str, Any]], tasks: str, cache: str) -> list[dict[str, Any]]:
    """On each rank, by layout."""
    import os

    os.environ.update(HF_DATASETS_CACHE=cache, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    from nemo_minitron.checkpoints import load_into, open_checkpoint
    from nemo_minitron.data import load_tokenizer
    from nemo_minitron.errors import DataError
    from nemo_minitron.evaluation.harness import MegatronLM, run_tasks
    from nemo_minitron.runtime.groups import ParallelLayout, initialize
    from nemo_minitron.runtime.model import build_model

    found = []
    for layout in layouts:
        groups = initialize(ParallelLayout(**layout))
        checkpoint = open_checkpoint(path)
        chunks = build_model(checkpoint.shape, checkpoint.architecture, groups)
        load_into(chunks, checkpoint, groups)
        model = MegatronLM(
            chunks, groups, load_tokenizer(checkpoint.tokenizer),
            vocab_size=checkpoint.shape.vocab_size, max_length=64, batch_size=3,
        )  # fmt: skip
        found.append({"results": run_tasks(model, list(TASKS), include_path=tasks), **answers(model)})
        with pytest.raises(DataError, match="nonesuch: lm-evaluation-harness has no such task"):
            run_tasks(model, ["choice", "nonesuch"], include_path=tasks)
    return found


def reference(path: str, tasks: str, cache: str) -> dict[str, Any]:
    """The same by the harness's own model."""
    import os

    os.environ.update(HF_DATASETS_CACHE=cache, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", DISABLE_MULTIPROC="1")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=path, dtype="float32", device="cpu", batch_size=1, max_length=64)
    found = simple_evaluate(
        model, tasks=list(TASKS), task_manager=TaskManager(include_path=tasks), bootstrap_iters=1000,
        log_samples=False, random_seed=1234, numpy_random_seed=1234, torch_random_seed=1234, fewshot_random_seed=1234,
    )  # fmt: skip
    return {"results": found["results"], **answers(model)}


LAYOUTS: list[dict[str, Any]] = [
    {"tensor": 2, "pipeline": 2},
    {"pipeline": 2, "virtual_pipeline": 2, "data": 2},
    {"tensor": 2, "sequence_parallel": True, "data": 2},
]


@pytest.mark.slow
def test_results_are_those_of_the_harness_with_transformers(tmp_path: Path) -> None:
    path = str(tiny_checkpoint(tmp_path / "model", num_hidden_layers=4))
    tasks, cache = str(write_tasks(tmp_path / "tasks")), str(tmp_path / "cache")
    expected = run_distributed(reference, 1, tmp_path, path=path, tasks=tasks, cache=cache)[0]
    ranks = run_distributed(evaluate, 4, tmp_path, path=path, layouts=LAYOUTS, tasks=tasks, cache=cache)
    for rank, layouts in enumerate(ranks):
        for found in layouts:
            assert found["texts"] == expected["texts"]
            assert [greedy for _, greedy in found["scores"]] == [greedy for _, greedy in expected["scores"]]
            for kind in ("scores", "rolling"):
                mine = torch.tensor([one if kind == "rolling" else one[0] for one in found[kind]])
                theirs = torch.tensor([one if kind == "rolling" else one[0] for one in expected[kind]])
                assert torch.allclose(mine, theirs, atol=1e-4, rtol=1e-5), kind
            assert set(found["results"]) == (set() if rank else set(TASKS))
            for task, result in found["results"].items():
                metrics = {key.removesuffix(",none"): value for key, value in expected["results"][task].items()}
                assert result["metrics"], task
                for metric, value in result["metrics"].items():
                    assert value == pytest.approx(metrics[metric], rel=1e-4), (task, metric)
                assert result["samples"] == 9
        assert rank or found["results"]["choice"]["num_fewshot"] == 1
