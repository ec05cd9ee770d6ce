"""``minitron benchmark``: engines against each other and a reference, the turns, the file, the report, the refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.run_dir import write_run, write_stage
from support.text import sentences, write_jsonl

from nemo_minitron.config import BenchmarkConfig, OptionalDataConfig
from nemo_minitron.errors import CheckpointError, DataError, MinitronError
from nemo_minitron.report import collect, draw, write_report
from nemo_minitron.report.serving import PUBLISHED, serving_plots, serving_tables
from nemo_minitron.serving.engine import Options
from nemo_minitron.serving.process import EngineProcess
from nemo_minitron.serving.rounds import ratios, spread
from nemo_minitron.stages import benchmark

# --- settings and plan


def test_settings_that_cannot_be_run_are_named_together() -> None:
    config = BenchmarkConfig(
        models={"a": "a", "b": "b.gguf"},
        baseline="c",
        engines=["transformers", "vllm"],
        repeats=0,
        tokens=8,
        evaluation="e",
        data=OptionalDataConfig(sequence_length=16, documents="mask"),
    )
    assert config.faults() == [
        "repeats=0: must be above 0",
        "engines: 'vllm' must be one of transformers, megatron, llama.cpp",
        "baseline=c: is none of the models (a, b)",
        "models.b=b.gguf: none of the engines runs it; add llama.cpp to engines",
        "tokens=8: evaluation=e gives the losses; leave one of them out",
        "tokens=8: less than one block of data.sequence_length=16",
        "data.documents=mask: llama.cpp and transformers take no mask; set it to join",
    ]
    assert BenchmarkConfig().faults() == ["models: none is given; map at least one name to a path"]
    config = BenchmarkConfig(models={"a": "a", "b": "b.gguf"}, tokens=512)
    assert config.faults() == ["tokens=512: data.sources has no text for it; list at least one {name, path}"]
    assert config.runs() == [("a", "transformers"), ("a", "megatron"), ("b", "llama.cpp")]


def test_a_missing_llama_cpp_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    config = BenchmarkConfig(models={"a": str(tmp_path / "a.gguf")}, output=str(tmp_path / "out"))
    (fault,) = benchmark.plan(config).faults
    assert "benchmark with llama.cpp needs llama-cpp-python (not installed): CMAKE_ARGS=" in fault
    assert fault.endswith('pip install "nemo-minitron[llama-cpp]"')
    from nemo_minitron.jobs.needs import check_needs

    with pytest.raises(MinitronError, match="llama-cpp-python"):
        check_needs([config])
    config.models["b"] = str(tmp_path)
    config.skip_missing = True
    check_needs([config])
    (note,) = benchmark.plan(config).notes
    assert note.startswith("left out: benchmark with llama.cpp needs llama-cpp-python")
    assert benchmark._runs(config) == [("b", "transformers"), ("b", "megatron")]
    del config.models["b"]
    with pytest.raises(MinitronError, match="llama-cpp-python"):  # nothing would be left
        benchmark._runs(config)


# --- figures


@given(st.lists(st.tuples(st.floats(0.1, 1e3), st.floats(0.1, 1e3)), min_size=1, max_size=9), st.floats(0.5, 2.0))
def test_a_ratio_is_that_of_each_round(rounds: list[tuple[float, float]], slow: float) -> None:
    """A machine that is slower in one round changes no ratio of it, whichever round that is."""
    ours, theirs = [list(column) for column in zip(*rounds, strict=True)]
    before = ratios(ours, theirs)
    assert before["low"] <= before["median"] <= before["high"]
    ours[0], theirs[0] = ours[0] * slow, theirs[0] * slow
    assert ratios(ours, theirs) == pytest.approx(before, rel=1e-5)
    assert ratios(theirs, theirs) == {"median": 1, "low": 1, "high": 1}
    assert spread(ours)["low"] == pytest.approx(min(ours), rel=1e-5)


# --- the engines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.checkpoints import tiny_checkpoint

    from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint

    path = tmp_path_factory.mktemp("models")
    tiny_checkpoint(path / "teacher", num_hidden_layers=4)
    write_checkpoint(open_checkpoint(tiny_checkpoint(path / "hf", num_hidden_layers=2)), path / "student", "nemo2")
    write_jsonl(path / "text.jsonl", sentences(60, 40, 0))
    return path


@pytest.mark.slow
def test_models_are_measured_side_by_side(folder: Path, tmp_path: Path) -> None:
    """A Hugging Face and a NeMo model in both engines: tokens and losses are those of transformers' own."""
    import torch
    from support.checkpoints import hf_logits

    from nemo_minitron.data import build_blocks
    from nemo_minitron.jobs.local import run_stage

    config = BenchmarkConfig(
        models={"teacher": str(folder / "teacher"), "student": str(folder / "student")},
        output=str(tmp_path / "benchmark"),
        batch_size=2,
        prompt_tokens=9,
        new_tokens=3,
        repeats=2,
        tokens=40,
        data=OptionalDataConfig(sequence_length=16, held_out_fraction=0.5, cache_dir=str(tmp_path / "cache")),
    )
    config.data.sources = [_source(folder / "text.jsonl")]
    record = run_stage(config)
    content = json.loads((tmp_path / "benchmark/benchmark.json").read_text())
    assert record["metrics"] == content
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".benchmark")] == []  # converted copies
    assert {name: facts["baseline"] for name, facts in content["engines"].items()} == {
        "transformers": "teacher", "megatron": "teacher",
    }  # fmt: skip
    blocks = build_blocks(config.data, folder / "teacher", "held_out", blocks=2).tokens
    for name, place in (("teacher", "teacher"), ("student", "hf")):
        model = content["models"][name]
        logits = hf_logits(folder / place, blocks[:, :-1]).double()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
        assert model["loss"] == pytest.approx(float(loss), abs=1e-5)
        assert set(model["engines"]) == {"transformers", "megatron"}
        for own in model["engines"].values():
            assert own["memory_bytes"] >= own["libraries_bytes"] > 50e6
            for key in ("first_token_seconds", "prefill_tokens_per_second", "decode_tokens_per_second"):
                figure = own[key]
                assert 0 < figure["low"] <= figure["median"] <= figure["high"]
            assert own["ratios"]["parameters"] == pytest.approx(
                model["parameters"] / content["models"]["teacher"]["parameters"], abs=1e-4
            )
    assert content["models"]["teacher"]["engines"]["megatron"]["ratios"]["decode"]["median"] == 1
    assert content["loss_from"] == {"tokens": 32, "sequence_length": 16, "sources": ["mine"]}

    prompts = [[3, 4, 5, 6], [9, 8, 7, 6]]
    answers = {}
    for engine in ("transformers", "megatron"):
        with EngineProcess(
            engine, folder / "teacher", Options(device="cpu", batch_size=2), tmp_path / "log"
        ) as process:
            process.wait()
            timing, answers[engine] = process.generate(prompts, 5)
            assert timing.first > 0 and timing.further > 0
    assert answers["transformers"] == answers["megatron"]
    ids = torch.tensor(prompts)
    for _ in range(6):
        ids = torch.cat([ids, hf_logits(folder / "teacher", ids)[:, -1:].argmax(-1)], 1)
    assert answers["megatron"] == ids[:, 4:].tolist()  # an end token among them ends nothing

    process = EngineProcess("transformers", folder / "student", Options(device="cpu"), tmp_path / "log")
    with process, pytest.raises(CheckpointError, match="transformers cannot load it"):
        process.wait()
    with EngineProcess("transformers", folder / "teacher", Options(device="cpu"), tmp_path / "log") as process:
        process.wait()
        process._process.kill()
        with pytest.raises(MinitronError, match=r"its process ended with code -9 \(killed: too little memory\?\)"):
            process.memory()


def _source(path: Path) -> Any:
    from nemo_minitron.config import SourceConfig

    return SourceConfig(name="mine", path=str(path))


def test_losses_of_an_evaluation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By path; else by name, but not for a GGUF file, which may be quantized."""
    (tmp_path / "evaluation").mkdir()
    models = {"teacher": {"path": str(tmp_path / "t"), "loss": 3.0}, "student": {"path": "elsewhere", "loss": 4.0}}
    (tmp_path / "evaluation/evaluation.json").write_text(json.dumps({"models": models}))
    ours = {"big": str(tmp_path / "t"), "student": "here", "other": "there"}
    config = BenchmarkConfig(models=ours, evaluation=str(tmp_path / "evaluation"))
    assert benchmark._evaluated(config) == {"big": 3.0, "student": 4.0}
    assert "has no loss of other" in caplog.text
    config.models = {"student": "student.gguf"}
    assert benchmark._evaluated(config) == {}
    config.evaluation = str(tmp_path)
    with pytest.raises(DataError, match="is no output of evaluate"):
        benchmark._evaluated(config)


# --- the report


def figure(value: float) -> dict[str, float]:
    return {"median": value, "low": 0.9 * value, "high": 1.1 * value}


def content_of(run: Path) -> dict[str, Any]:
    def engine(weights: str, factor: float) -> dict[str, Any]:
        shares = {"size": 0.69, "memory": 0.8, "parameters": 0.69}
        return {
            "weights": weights,
            "memory_bytes": 900_000_000,
            "libraries_bytes": 400_000_000,
            "gpu_bytes": 0,
            "first_token_seconds": figure(0.25),
            "prefill_tokens_per_second": figure(512 * factor),
            "decode_tokens_per_second": figure(20 * factor),
            "ratios": shares | {key: figure(factor) for key in ("first_token", "prefill", "decode")},
        }

    def model(path: Path, loss: float | None, **engines: Any) -> dict[str, Any]:
        return {
            "path": str(path), "format": "hf", "size_bytes": 2**28, "parameters": 9, "loss": loss, "engines": engines,
        }  # fmt: skip

    both = {"transformers": engine("float32", 1.0), "megatron": engine("float32", 1.0)}
    return {
        "batch_size": 1,
        "prompt_tokens": 128,
        "new_tokens": 32,
        "repeats": 5,
        "threads": 2,
        "dtype": "float32",
        "processor": "a processor, 2 cores",
        "loss_from": {"evaluation": str(run / "evaluation")},
        "engines": {
            "transformers": {"version": "4.51.3", "device": "cpu", "baseline": "teacher"},
            "megatron": {"version": "0.13.1", "device": "cpu", "baseline": "teacher"},
            "llama.cpp": {"version": "0.3", "device": "cpu", "baseline": "student-q8"},
        },
        "models": {
            "teacher": model(run / "teacher", 3.221, **both),
            "student": model(run / "distilled/model", 3.842, transformers=engine("float32", 1.4)),
            "student-q8": model(run / "export/model.gguf", None, **{"llama.cpp": engine("Q8_0", 1.0)}),
        },
    }


def test_the_report_shows_loss_against_speed_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "DPI", 16)
    run = write_run(tmp_path / "run", steps=20)
    content = content_of(run)
    (write_stage(run, "speeds", "benchmark", seconds=60, minute=20) / "benchmark.json").write_text(json.dumps(content))
    read = collect(run)
    assert read.roles["student"] == read.roles["student-q8"] == "distilled"
    first, _, last = serving_tables(read, content)
    assert first.rows[1] == [
        "student", "float32", "3.842", "256.0 MiB (0.69×)", "858.3 MiB (0.80×)", "250 (225 to 275)",
        "717 (645 to 788)", "28.0 (25.2 to 30.8)", "1.40 (1.26 to 1.54)×", "1.40 (1.26 to 1.54)×",
    ]  # fmt: skip
    assert first.rows[0][-2:] == ["1", "1"]
    assert last.rows[0][:3] == ["student-q8", "Q8_0", "–"]
    names = [plot.name for plot in serving_plots(read, content)]
    assert names == ["serving-speed", "serving-size"]
    (tmp_path / "report").mkdir()
    write_report(run, tmp_path / "report")
    page = (tmp_path / "report/index.html").read_text()
    text = (tmp_path / "report/report.md").read_text()
    for written in (page, text):
        assert "Served with transformers 4.51.3 on the CPU" in written
        assert PUBLISHED[:60] in written and "not measured here" in written
    assert {path.name for path in (tmp_path / "report/plots").glob("serving*")} == {
        "serving-speed.png", "serving-size.png",
    }  # fmt: skip
    assert not [remark for remark in read.remarks if "benchmark" in remark]


def test_a_benchmark_without_losses_or_with_a_hole(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=20)
    content = content_of(run)
    for model in content["models"].values():
        model["loss"] = None
    assert serving_plots(collect(run), content) == []
    del content["models"]["teacher"]["engines"]["megatron"]["ratios"]
    (write_stage(run, "speeds", "benchmark", seconds=60, minute=20) / "benchmark.json").write_text(json.dumps(content))
    read = collect(run)
    assert read.servings == []
    assert any("the benchmark of speeds is incomplete" in remark for remark in read.remarks)
