"""Parts of the report: costs, size and speed, searches, tokens that were not counted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.run_dir import STUDENT, write_aligned_run, write_model, write_run, write_stage

from nemo_minitron.config import ReportConfig, ScoreConfig, SearchConfig, SteerlmConfig
from nemo_minitron.data.blocks import Blocks
from nemo_minitron.jobs.records import identity_of, write_record
from nemo_minitron.report import collect, draw, plots, score_plots, search, tables
from nemo_minitron.report.costs import cost_table, gpu_hours, ranks_of
from nemo_minitron.report.measures import measure_table, shortfall
from nemo_minitron.runtime.memory import peak_gpu_bytes
from nemo_minitron.stages import report


@pytest.fixture(autouse=True)
def small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "DPI", 16)


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_aligned_run(tmp_path_factory.mktemp("runs") / "aligned")


def change(run: Path, stage: str, **values: Any) -> None:
    """Change values of a record; those of ``config`` and ``runtime`` are added to it."""
    file = run / stage / "record.json"
    record = json.loads(file.read_text())
    record["config"] |= values.pop("config", {})
    file.write_text(json.dumps(record | values))


def rows(table: Any) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in table.rows}


def test_gpu_hours_are_gpus_times_wall_time(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name, stage, seconds in (("teacher", "import", 36), ("distilled", "distill", 7200), ("old", "score", 3600)):
        write_stage(run, name, stage, seconds=seconds, minute=0, runtime={"device": "auto", "timeout_minutes": 60})
    change(run, "distilled", ranks=8, gpus=8, peak_gpu_bytes=3 * 2**30, config={"max_minutes": 180})
    change(run, "distilled", config={"runtime": {"device": "auto", "timeout_minutes": None}})
    read = collect(run)
    assert rows(cost_table(read, price=2.5, currency="EUR")) == {
        "teacher": ["import", "36 s", "1", "0", "0.01", "0", "1", "0.00"],
        "distilled": ["distill", "2 h 00 min", "8", "8", "16", "16", "24", "40.00"],
        "old": ["score", "1 h 00 min", "1", "?", "1", "–", "1", "–"],
        "all": ["", "3 h 00 min", "", "", "17", "16 + ?", "26", "40.00 + ?"],
    }
    table = cost_table(read, price=2.5, currency="EUR")
    assert table.headings[-1] == "price, EUR"
    assert "a GPU-hour at 2.50 EUR" in table.caption and "record of 1 stage does not say" in table.caption
    assert "price" not in " ".join(cost_table(read).headings)
    report.run(ReportConfig(run=str(run), output=str(run / "report"), price_per_gpu_hour=2.5, currency="EUR"))
    page = (run / "report/index.html").read_text()
    assert "<td>40.00</td>" in page and "peak GPU memory" in page and "3.00 GiB" in page


def test_records_of_earlier_releases(tmp_path: Path) -> None:
    """They do not say how many ranks and GPUs there were; their configurations do, as far as they can."""
    run = tmp_path / "run"
    layout = {"tensor": 2, "pipeline": 2, "data": 1}
    for name, device in (("cuda", "cuda"), ("cpu", "cpu"), ("auto", "auto")):
        write_stage(run, name, "distill", seconds=1800, minute=0, parallel=layout, runtime={"device": device})
    change(run, "cuda", config={"teacher_placement": "own_ranks", "teacher_parallel": {"tensor": 4}})
    stages = {stage.name: stage for stage in collect(run).stages}
    assert {name: ranks_of(stage) for name, stage in stages.items()} == {"cuda": 8, "cpu": 4, "auto": 4}
    assert {name: gpu_hours(stage) for name, stage in stages.items()} == {"cuda": 4.0, "cpu": 0.0, "auto": None}


def test_records_say_how_many_gpus_were_used(tmp_path: Path) -> None:
    config = ScoreConfig(model="m", output=str(tmp_path / "out"))
    Path(config.output).mkdir()
    written = [
        write_record(config, identity_of(config), {}, 1.0, peak_gpu_bytes=sizes)
        for sizes in ([0, 0], [5, 9, 0, 3], None)
    ]
    values = [[record[name] for name in ("ranks", "gpus", "peak_gpu_bytes")] for record in written]
    assert values == [[2, 0, None], [4, 3, 9], [1, None, None]]
    # The processes of these do nothing themselves: what they start does.
    for leading in (SearchConfig(model="m", scores="s"), SteerlmConfig(model="m")):
        leading.output = str(tmp_path / leading.STAGE)
        Path(leading.output).mkdir()
        record = write_record(leading, identity_of(leading), {}, 1.0, peak_gpu_bytes=[0])
        assert (record["ranks"], record["gpus"]) == (1, None)
    assert peak_gpu_bytes() == 0 or torch.cuda.is_initialized()


def test_a_price_is_above_zero() -> None:
    assert ReportConfig(run="r", price_per_gpu_hour=0.0).faults() == ["price_per_gpu_hour=0.0: must be above 0"]


def test_size_and_speed_are_what_was_measured(aligned: Path) -> None:
    table = measure_table(collect(aligned))
    assert table is not None
    shown = rows(table)
    assert set(shown) == {"teacher", "pruned", "distilled", "sft", "dpo"}
    assert shown["teacher"][0::2] == ["134.5 M", "1,000", "5.20"]
    assert shown["teacher"][3] == "44.00"
    assert shown["pruned"][2:] == ["1,001", "31.00", "4.10"]  # timed by the search: it has that shape
    assert shown["dpo"][2] == "1,004"  # of its export
    assert all(row[1].endswith("KiB") for row in shown.values())


def test_headline_figures_are_those_of_the_exported_model(aligned: Path) -> None:
    """It was measured by the second evaluation; the first one has the pruned models."""
    shown = {card.label: card.value for card in tables.cards(collect(aligned))}
    assert shown == {
        "parameters": "93.4 M", "held-out loss": "3.600", "scored pruning": "4.66", "loss gap recovered": "57%",
        "time": "21 min 08 s",
    }  # fmt: skip


def test_what_was_not_measured_has_no_column(tmp_path: Path) -> None:
    table = measure_table(collect(write_run(tmp_path / "run", steps=4)))
    assert table is not None and table.headings == ["model", "parameters", "size on disk"]
    bare = tmp_path / "bare"
    write_stage(bare, "scores", "score", seconds=1, minute=0)
    assert measure_table(collect(bare)) is None


@pytest.mark.slow
def test_a_search_is_shown_with_what_it_chose(aligned: Path, tmp_path: Path) -> None:
    report.run(ReportConfig(run=str(aligned), output=str(tmp_path / "out")))
    page, text = (tmp_path / "out/index.html").read_text(), (tmp_path / "out/report.md").read_text()
    assert "7 shapes are within the budget; 2 were measured" in page
    assert "Chosen: l28." in page and "Chosen: l28." in text
    assert "| l28 | 93.4 M | 190.7 MiB | 31.0 ms | 0.70 |" in text
    assert (tmp_path / "out/plots/pareto.png").is_file()
    assert (tmp_path / "out/plots/times.png").is_file()
    # Two evaluations, two figures.
    assert {path.name for path in (tmp_path / "out/plots").glob("losses*")} == {
        "losses-benchmarks.png", "losses-evaluation.png",
    }  # fmt: skip
    assert (tmp_path / "out/plots/benchmarks-benchmarks.png").is_file()


def test_units_of_costs_follow_their_size() -> None:
    def scale(cost: str, value: float) -> str:
        return search._scale(cost, [{cost: value}])[1]

    assert scale("parameters", 2e9) == "parameters, billions"
    assert scale("parameters", 9e5) == "parameters, thousands"
    assert scale("memory", 2.0**20) == "memory of the fullest rank, MiB"
    assert scale("prefill", 1e-5) == "prefill, ms"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"asked_tokens": 32_768}, None),
        ({"asked_tokens": 32_800}, "32,800 tokens were asked for and 32,768 counted: 32 do not fill a block of 256."),
        (
            {"asked_tokens": 32_768, "tokens": 32_000, "uncounted": {"filling": 700, "beginnings": 68}},
            "32,768 tokens were asked for and 32,000 counted: 700 are filling at the ends of blocks "
            "(data.packing=best_fit); 68 begin a document, and nothing of it comes before them (data.documents=mask).",
        ),
        (
            {"asked_tokens": 65_536},
            "65,536 tokens were asked for and 32,768 counted: the text gave 128 blocks of 256 tokens, and 256 "
            "blocks were asked for.",
        ),
    ],
)
def test_why_fewer_tokens_were_counted(changes: dict[str, Any], expected: str | None) -> None:
    evaluation = {"tokens": 32_768, "blocks": 128, "sequence_length": 256, **changes}
    assert shortfall(None, evaluation) == expected


def test_why_fewer_tokens_were_counted_in_earlier_records() -> None:
    evaluation = {"tokens": 32_000, "blocks": 128, "sequence_length": 256}
    assert shortfall(33_000, evaluation) == (
        "33,000 tokens were asked for and 32,000 counted: 232 do not fill a block of 256; 768 labels do not count: "
        "filling, beginnings of documents, or masked."
    )


@given(data=st.data(), length=st.integers(1, 6), count=st.integers(1, 4))
def test_every_label_counts_or_has_a_reason_not_to(data: st.DataObject, length: int, count: int) -> None:
    def numbers(low: int, high: int, columns: int) -> torch.Tensor:
        row = st.lists(st.integers(low, high), min_size=columns, max_size=columns)
        return torch.tensor(data.draw(st.lists(row, min_size=count, max_size=count)))

    tokens = numbers(0, 9, length + 1)
    segments = numbers(-1, 2, length + 1).int() if data.draw(st.booleans()) else None
    mask = numbers(0, 1, length).bool() if data.draw(st.booleans()) else None
    blocks = Blocks(tokens, torch.zeros(count, dtype=torch.int64), ("",), segments, mask)
    reasons = blocks.uncounted()
    assert sum(reasons.values()) + blocks.labels == count * length
    assert all(reasons.values())
    if segments is not None:
        assert reasons.get("filling", 0) == int((segments[:, 1:] == -1).sum())


def test_scores_show_what_was_pruned_by_them(aligned: Path) -> None:
    """A second pruning, by other scores, drops other layers."""
    run = collect(aligned)
    (scores,) = run.scores
    figure = score_plots.layers(scores, run)
    assert figure is not None and "dropped layers (12, 17)" in figure.caption
    pruned = next(model for model in run.models if model.name == "pruned")
    assert pruned.kept is not None
    other = dataclasses.replace(pruned, name="random", kept={**pruned.kept, "layers": list(range(28))})
    run.models = [other, *run.models]
    stage = next(stage for stage in run.stages if stage.name == "random")
    stage.record["parents"] = {"scores": {"path": "/elsewhere/scores", "hash": "x"}}
    again = score_plots.layers(scores, run)
    assert again is not None and again.caption == figure.caption


def test_curves_of_alignments(aligned: Path) -> None:
    run = collect(aligned)
    assert [curve.name for curve in run.alignments] == ["sft", "dpo round-1"]
    figures = [plots.aligning(curve) for curve in run.alignments]
    assert [figure.name for figure in figures if figure] == ["training-sft", "training-dpo round-1"]
    assert "Training loss from" in figures[0].alt  # type: ignore[union-attr]


def test_stages_that_steer_have_their_model_below_another(tmp_path: Path) -> None:
    """``steerlm`` runs ``sft``, which writes its model."""
    steered = write_stage(tmp_path, "steered", "steerlm", seconds=1, minute=0)
    (steered / "sft").mkdir()
    write_model(steered / "sft/model", STUDENT, {"sft": {}})
    (model,) = collect(tmp_path).models
    assert (model.role, model.path) == ("aligned", steered / "sft/model")
