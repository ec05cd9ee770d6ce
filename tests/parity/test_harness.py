"""lm-evaluation-harness on a live Megatron model: what the harness gets from transformers, in any layout."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import tiny_checkpoint, tiny_tokenizer
from support.distributed import run_distributed
from support.harness import TASKS, live_model, same_metrics, with_transformers, write_tasks
from support.text import sentences, write_jsonl


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


def reference(path: str, tasks: str) -> dict[str, Any]:
    """What the harness's own model gets."""
    model, found = with_transformers(path, tasks, max_length=64)
    return {"results": found, **answers(model)}


LAYOUTS: list[dict[str, Any]] = [
    {"tensor": 2, "sequence_parallel": True},
    {"pipeline": 2, "virtual_pipeline": 2},
]


def evaluate(path: str, tasks: str, folder: str) -> dict[str, Any]:
    """On each rank: the reference (rank 0), results and answers by layout, and the stage's results."""
    os.environ.update(
        HF_DATASETS_CACHE=f"{folder}/cache", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", DISABLE_MULTIPROC="1"
    )
    from nemo_minitron.config import DataConfig, EvaluateConfig, HarnessConfig, ParallelLayout, SourceConfig
    from nemo_minitron.evaluation.harness import run_tasks
    from nemo_minitron.runtime.groups import initialize
    from nemo_minitron.stages import evaluate as stage

    found: dict[str, Any] = {"layouts": []}
    for layout in LAYOUTS:
        groups = initialize(ParallelLayout(**layout))
        model = live_model(path, groups, max_length=64, batch_size=3)
        found["layouts"].append({"results": run_tasks(model, list(TASKS), include_path=tasks), **answers(model)})
    config = EvaluateConfig(
        models={"model": path},
        output=f"{folder}/evaluation",
        data=DataConfig(
            sources=[SourceConfig(name="text", path=f"{folder}/text.jsonl")], sequence_length=16,
            held_out_fraction=0.5, cache_dir=f"{folder}/blocks",
        ),
        tokens=64,
        harness=HarnessConfig(tasks=["choice", "question"], include_path=tasks, trust_task_code=True, batch_size=2),
        parallel=ParallelLayout(data=2),
    )  # fmt: skip
    found["stage"] = stage.run(config)["models"]["model"]["harness"]
    if os.environ["RANK"] == "0":
        found["reference"] = reference(path, tasks)
    return found


@pytest.mark.slow
def test_results_are_those_of_the_harness_with_transformers(tmp_path: Path) -> None:
    path = str(tiny_checkpoint(tmp_path / "model", num_hidden_layers=4))
    tasks = str(write_tasks(tmp_path / "tasks"))
    write_jsonl(tmp_path / "text.jsonl", sentences(20, 30, 1))
    ranks = run_distributed(evaluate, 2, tmp_path, path=path, tasks=tasks, folder=str(tmp_path))
    expected = ranks[0]["reference"]
    for rank, result in enumerate(ranks):
        for found in result["layouts"]:
            assert found["texts"] == expected["texts"]
            assert [greedy for _, greedy in found["scores"]] == [greedy for _, greedy in expected["scores"]]
            for kind in ("scores", "rolling"):
                mine, theirs = (
                    torch.tensor([one if kind == "rolling" else one[0] for one in each[kind]])
                    for each in (found, expected)
                )
                assert torch.allclose(mine, theirs, atol=1e-4, rtol=1e-5), kind
            assert set(found["results"]) == (set() if rank else set(TASKS))
            same_metrics(found["results"], expected["results"])
    assert ranks[0]["layouts"][0]["results"]["choice"]["num_fewshot"] == 1
    assert set(ranks[0]["stage"]) == {"choice", "question"}
    same_metrics(ranks[0]["stage"], expected["results"])


def test_unknown_tasks_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lm_eval import tasks

    from nemo_minitron.errors import DataError
    from nemo_minitron.evaluation import harness

    class OwnTasks(tasks.TaskManager):
        """Without the harness's thousands of files, which are not looked for here."""

        def __init__(self, include_path: str, include_defaults: bool = False) -> None:
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", OwnTasks)
    folder = str(write_tasks(tmp_path / "tasks"))
    with pytest.raises(DataError, match="nonesuch, other: lm-evaluation-harness has no such task"):
        harness.run_tasks(None, ["choice", "nonesuch", "other"], include_path=folder)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["{{ question | nonesuch }}", "{{ question.a.b.c }}", "{% if %}"])
def test_a_task_whose_template_fails_is_refused(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lm_eval import tasks
    from lm_eval.models.dummy import DummyLM

    from nemo_minitron.errors import DataError
    from nemo_minitron.evaluation import harness

    class OwnTasks(tasks.TaskManager):
        """Without the harness's thousands of files, which are not looked for here."""

        def __init__(self, include_path: str, include_defaults: bool = False) -> None:
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", OwnTasks)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = write_tasks(tmp_path / "tasks")
    name = next(iter(TASKS))
    config = json.loads((folder / f"{name}.yaml").read_text())
    (folder / f"{name}.yaml").write_text(json.dumps(config | {"doc_to_text": text}))
    with pytest.raises(DataError, match=rf"harness.tasks={name}: ") as caught:
        harness.run_tasks(DummyLM(), [name], include_path=str(folder))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for x in %}", "TemplateSyntaxError"),
        ("{{ raise_exception('no system turn') }}", "TemplateError: no system turn"),
        ("{{ messages[0].content.nonesuch() }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_chat_template_that_fails_is_refused(template: str, reason: str, tmp_path: Path) -> None:
    from nemo_minitron.data import load_tokenizer
    from nemo_minitron.errors import DataError
    from nemo_minitron.evaluation.harness import MegatronLM

    model = MegatronLM.__new__(MegatronLM)  # its template needs no model
    model.tokenizer = load_tokenizer(tiny_tokenizer(tmp_path))
    assert "w1" in model.apply_chat_template([{"role": "user", "content": "w1"}])
    model.tokenizer.chat_template = template
    with pytest.raises(DataError, match=rf"the tokenizer's template fails \({reason}.*set it to false") as caught:
        model.apply_chat_template([{"role": "user", "content": "w1"}])
    assert "\n" not in str(caught.value)
