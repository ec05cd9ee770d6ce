"""Several runs side by side, lineage, the shape diagram and the model card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from support.run_dir import LOSSES, write_evaluation, write_run, write_stage
from typer.testing import CliRunner

from nemo_minitron.cli.app import app
from nemo_minitron.config import ReportConfig
from nemo_minitron.errors import DataError
from nemo_minitron.report import collect
from nemo_minitron.report.compare import compare
from nemo_minitron.report.diagram import shape_diagram
from nemo_minitron.stages import report


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs that differ in the length and the rate of the distillation, and one has a stage more."""
    home = tmp_path_factory.mktemp("runs")
    one, two = write_run(home / "one", steps=60), write_run(home / "two", steps=100)
    for run, lr in ((one, 1e-4), (two, 3e-4)):
        path = run / "distilled" / "record.json"
        record = json.loads(path.read_text())
        record["config"] |= {"lr": lr, "steps": 60, "loss": {"kind": "forward_kl"}}
        record["parents"] = {
            "student": {"path": str(run / "pruned"), "hash": "abc" * 12},
            "teacher": {"path": str(run / "teacher"), "hash": "def" * 12},
        }
        path.write_text(json.dumps(record))
        lines = [json.loads(line) for line in (run / "distilled" / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            line.setdefault("tokens", line["step"] * 1024)
        (run / "distilled" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_stage(two, "corrected", "correct", seconds=12, minute=2)
    write_evaluation(two / "evaluation", two, {**LOSSES, "distilled": 3.701})
    return one, two


def test_comparison_states_what_differs_and_nothing_else(runs: tuple[Path, Path]) -> None:
    found = compare(runs)
    assert found.labels == ["one", "two"]
    assert found.settings is not None
    assert [row[0] for row in found.settings.rows] == ["distilled.lr", "corrected"]
    assert found.settings.rows[0][1:] == ["0.0001", "0.0003"]
    assert found.settings.rows[1][1:] == ["–", "there"]
    assert found.losses is not None
    rows = {row[0]: row[1:] for row in found.losses.rows}
    assert rows["distilled"] == ["3.842 ± 0.050", "3.701 ± 0.050"]
    assert {figure.name for figure in found.figures} == {"compare-lm_loss", "compare-kl"}
    overview = {row[0]: row for row in found.overview.rows}
    assert overview["two"][3] == "3.701"
    assert overview["one"][5] == "61.4 k"
    assert overview["two"][5] == "102.4 k"


def test_comparison_of_one_run_with_itself_is_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="given twice"):
        compare([runs[0], runs[0] / ".." / "one"])
    with pytest.raises(DataError, match="no such run directory"):
        compare([runs[0], tmp_path / "nothing"])


def test_labels_tell_runs_of_one_name_apart(runs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    again = write_run(tmp_path / "other" / "one", steps=30)
    parent = runs[0].parent.name
    assert compare([runs[0], again]).labels == [f"{parent}/one", "other/one"]


def test_the_command_takes_directories(runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ReportConfig] = []

    def run_stage(config: ReportConfig, show: object) -> dict[str, object]:
        seen.append(config)
        return {"name": "report", "seconds": 0.0}

    monkeypatch.setattr("nemo_minitron.jobs.local.run_stage", run_stage)
    one, two = map(str, runs)
    for words in ([one], [one, two], [one, two, "output=here", "title=A, B"]):
        done = CliRunner().invoke(app, ["report", *words])
        assert done.exit_code == 0, done.output
    assert [(c.run, c.others, c.output) for c in seen] == [
        (one, [], f"{one}/report"),
        (one, [two], f"{one}/comparison"),
        (one, [two], "here"),
    ]
    assert seen[2].title == "A, B"


def test_comparison_page(runs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    metrics = report.run(ReportConfig(run=str(runs[0]), others=[str(runs[1])], output=str(out)))
    assert metrics == {"runs": 2, "remarks": ["corrected left no metrics.jsonl; its curves are left out"]}
    page, text = (out / "index.html").read_text(), (out / "report.md").read_text()
    for shown in ("distilled.lr", "3.701 ± 0.050", "Settings that differ"):
        assert shown in page
    assert "![Curves of held-out language-model loss" in text
    assert len(list((out / "plots").iterdir())) == 2


def test_diagram_lineage_and_card(runs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = ReportConfig(
        run=str(runs[1]), output=str(out), title="Small", base_model="org/large", license="apache-2.0"
    )
    report.run(config)
    figure = shape_diagram(collect(runs[1]))
    assert figure is not None
    assert "pruned: 28 layers, hidden 576, FFN 832, 9 heads" in figure.alt
    assert (out / "plots" / "shapes.png").is_file()
    text = (out / "report.md").read_text()
    assert "student: pruned abcabcabcabc; teacher: teacher defdefdefdef" in text.replace("\\", "")

    card = (out / "model-card.md").read_text()
    _, front, body = card.split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["base_model"] == "org/large"
    assert values["license"] == "apache-2.0"
    assert values["library_name"] == "transformers"
    assert values["tags"] == ["minitron", "pruned", "distilled"]
    (result,) = values["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 3.701
    assert body.lstrip().startswith("# Small")
    assert "lr 0.0003" in body.replace("\\", "")


def test_no_card_and_no_diagram_without_a_small_model(tmp_path: Path) -> None:
    import shutil

    run = write_run(tmp_path / "run", steps=30)
    for name in ("pruned", "random", "distilled"):
        shutil.rmtree(run / name)
    report.run(ReportConfig(run=str(run), output=str(tmp_path / "out")))
    assert not (tmp_path / "out" / "model-card.md").exists()
    assert shape_diagram(collect(run)) is None
