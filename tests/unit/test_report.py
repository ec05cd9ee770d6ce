"""The report: what it shows of a whole run, what it leaves out of a partial one, and that nothing breaks the page."""

from __future__ import annotations

import base64
import html.parser
import json
import re
import shutil
from pathlib import Path

import pytest
from support.run_dir import (
    LOSSES,
    STUDENT,
    lineages,
    made_from,
    note_parents,
    write_evaluation,
    write_kept,
    write_model,
    write_run,
    write_scores,
    write_stage,
)

from nemo_minitron.config import ReportConfig
from nemo_minitron.errors import ConfigError, DataError
from nemo_minitron.report import collect, tables
from nemo_minitron.report.benchmarks import benchmark_table
from nemo_minitron.stages import report

VOID = {"meta", "source", "img", "link", "br", "hr", "input"}


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and gathers what tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.sources: list[str] = []
        self.texts: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if values.get("id"):
            assert values["id"] not in self.ids
            self.ids.add(str(values["id"]))
        self.links += [str(values["href"])] if "href" in values else []
        self.sources += [str(values[name]) for name in ("src", "srcset") if name in values]
        if tag == "img":
            self.images.append(values)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with its report."""
    run = write_run(tmp_path_factory.mktemp("runs") / "demo", steps=60)
    report.run(ReportConfig(run=str(run), output=str(run / "report"), title="A <b>title</b>"))
    return run


def test_page_is_self_contained_and_well_formed(whole: Path) -> None:
    text = (whole / "report" / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert len(page.images) == 8
    assert len(page.sources) == 16
    for source in page.sources:
        assert source.startswith("data:image/png;base64,")
        assert base64.b64decode(source.partition(",")[2], validate=True).startswith(b"\x89PNG")
    assert all(image["alt"] for image in page.images)
    assert not re.search(r"https?://", text)


def test_page_shows_every_part(whole: Path) -> None:
    page = Page((whole / "report" / "index.html").read_text(encoding="utf-8"))
    sections = {"pipeline", "shapes", "losses", "scores", "training", "answers", "costs", "environment"}
    assert sections <= page.ids
    text = " ".join(page.texts)
    share = (LOSSES["pruned"] - LOSSES["distilled"]) / (LOSSES["pruned"] - LOSSES["teacher"])
    assert f"{share:.0%}" in text
    for expected in ("134,515,008", "93,372,480", "69.4%", "11.270", "6 min 01 s", "0.13.1", "TP1 PP2 DP1", "(12, 17)"):
        assert expected in text, expected
    assert "The capital of France is Paris, a city\nin the north." in text


def test_text_of_models_and_configurations_is_escaped(whole: Path) -> None:
    text = (whole / "report" / "index.html").read_text(encoding="utf-8")
    assert "A &lt;b&gt;title&lt;/b&gt;" in text
    assert "<b>" not in text
    assert "Explain &lt;lists&gt;" in text
    markdown = (whole / "report" / "report.md").read_text(encoding="utf-8")
    assert "Explain \\<lists\\> in Python \\| briefly." in markdown


def test_markdown_tables_and_figures(whole: Path) -> None:
    markdown = (whole / "report" / "report.md").read_text(encoding="utf-8")
    assert "\n\n\n" not in markdown
    for block in re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(columns) == 1, block
    figures = re.findall(r"\]\((plots/[^)]+)\)", markdown)
    assert len(figures) == 8
    assert all((whole / "report" / figure).is_file() for figure in figures)


def test_exports_are_listed_by_format(whole: Path) -> None:
    table = tables.export_table(collect(whole))
    assert table is not None
    assert [row[:2] for row in table.rows] == [
        ["export/hf", "Hugging Face"],
        ["export/model.nemo", ".nemo"],
        ["export/nemo2", "NeMo 2"],
    ]


def test_an_exported_file_stands_with_its_size_and_loss(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=5)
    file = run / "export/gguf/model-Q8_0.gguf"
    record = json.loads((run / "export/record.json").read_text())
    figures = {"Q8_0": {"file": file.name, "bytes": 150_000, "weight_error": 0.0051}}
    record["metrics"] = {"formats": {"gguf": {"path": str(file.parent), "files": figures}}}
    (run / "export/record.json").write_text(json.dumps(record))
    (evaluation,) = run.glob("*/evaluation.json")
    content = json.loads(evaluation.read_text())
    content["models"]["quantized"] = content["models"]["distilled"] | {"path": str(file), "loss": 3.21987}
    evaluation.write_text(json.dumps(content))
    table = tables.export_table(collect(run))
    assert table is not None
    more = 3.21987 - content["models"]["distilled"]["loss"]
    assert table.rows[-1] == ["export/gguf/model-Q8_0.gguf", "GGUF Q8_0", "146.5 KiB", "3.2199", f"{more:+.4f}"]
    assert all(row[3:] == ["–", "–"] for row in table.rows[:-1])
    # it is no model of its own: what distillation won is said of the distilled one
    assert [found.model for found in tables.recoveries(collect(run), content)] == ["distilled"]


def test_quantized_exports_show_what_they_lose(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo", steps=10)
    quantized = run / "export" / "hf-int4"
    quantized.mkdir()
    (quantized / "config.json").write_text("{}")
    record = json.loads((run / "export" / "record.json").read_text())
    record["metrics"] = {"quantized": {"int4": {"algorithm": "W4A16_AWQ", "loss": 3.8125, "float_loss": 3.75}}}
    (run / "export" / "record.json").write_text(json.dumps(record))
    table = tables.export_table(collect(run))
    assert table is not None
    assert [[row[0], row[1], *row[3:]] for row in table.rows] == [
        ["export/hf", "Hugging Face", "–", "–"],
        ["export/hf-int4", "Hugging Face, W4A16_AWQ", "3.8125", "+0.0625"],
        ["export/model.nemo", ".nemo", "–", "–"],
        ["export/nemo2", "NeMo 2", "–", "–"],
    ]


def test_roles_come_from_the_stages_and_not_from_names(whole: Path) -> None:
    run = collect(whole)
    assert run.roles == {"teacher": "teacher", "pruned": "pruned", "random": "random", "distilled": "distilled"}
    assert [(m.name, m.role) for m in run.models] == [(n, n) for n in ("teacher", "pruned", "random", "distilled")]
    assert run.remarks == []
    recovery = tables.recoveries(run, run.evaluations[0][1])
    assert [(r.model, r.student, r.teacher) for r in recovery] == [("distilled", "pruned", "teacher")]


def test_pruned_reconstructed_distilled(tmp_path: Path) -> None:
    """The chain of the demonstration: both shares are of what pruning cost."""
    run = write_run(tmp_path / "run", steps=5)
    made = write_stage(
        run,
        "reconstructed",
        "reconstruct",
        seconds=90,
        minute=4,
        model=str(run / "pruned"),
        teacher=str(run / "teacher"),
    )
    write_model(made, STUDENT, made_from("reconstruct", run / "pruned", STUDENT, lineages(run)["pruned"]))
    write_kept(made)
    losses = {"teacher": 3.0, "pruned": 5.0, "reconstructed": 4.0, "blocks": 8}
    matrices = [{"name": "a", "ridge": 0.1}, {"name": "b", "ridge": None}]
    content = {
        "losses": {"plays": {**losses, "outside": False}, "news": {**losses, "reconstructed": 4.5, "outside": True}},
        "layers": [{"layer": 0, "matrices": matrices, "block": {"steps": 8, "before": 0.2, "after": 0.1}}],
    }
    (made / "reconstruction.json").write_text(json.dumps(content))
    record = json.loads((run / "distilled/record.json").read_text())
    record["config"]["student"] = str(made)
    (run / "distilled/record.json").write_text(json.dumps(record))
    write_evaluation(run / "evaluation", run, {**LOSSES, "reconstructed": 4.0, "distilled": 3.6})
    note_parents(
        run,
        pruned={"model": "teacher"},
        reconstructed={"model": "pruned", "teacher": "teacher"},
        distilled={"student": "reconstructed", "teacher": "teacher"},
    )
    found = collect(run)
    assert found.roles["reconstructed"] == "reconstructed"
    shares = {
        one.model: (one.student, one.by, round(one.share, 3))
        for one in tables.recoveries(found, found.evaluations[0][1])
    }
    gap = LOSSES["pruned"] - LOSSES["teacher"]
    assert shares == {
        "reconstructed": ("pruned", "reconstruction", round((LOSSES["pruned"] - 4.0) / gap, 3)),
        "distilled": ("pruned", "reconstruction and distillation", round((LOSSES["pruned"] - 3.6) / gap, 3)),
    }
    values = {card.label: card.value for card in tables.cards(found)}
    assert (values["loss gap recovered"], values["of it before training"]) == ("74%", "46%")
    report.run(ReportConfig(run=str(run), output=str(tmp_path / "report")))
    page = (tmp_path / "report/index.html").read_text(encoding="utf-8")
    assert "Reconstruction, without any training, won back" in page
    assert "Reconstruction and distillation won back" in page
    text = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert re.search(r"\| reconstructed \| reconstruct \|.*model: pruned .*teacher: teacher", text)
    assert re.search(r"\| distilled \| distill \|.*student: reconstructed ", text)
    assert "1 of 2 matrices and scales were refitted" in text
    assert "gradient steps made 1 of 1 layers better" in text
    assert "| news | no | 8 | 3.000 | 5.000 | 4.500 | 25% |" in text


def test_a_damaged_reconstruction_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    made = write_stage(run, "reconstructed", "reconstruct", seconds=90, minute=4)
    (made / "reconstruction.json").write_text('{"layers": [{"matrices": 3}]}')
    (remark,) = collect(run).remarks
    assert remark.startswith("the reconstruction of reconstructed is incomplete")


def test_a_training_from_a_cache_of_logits_has_no_teacher(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    record = run / "distilled" / "record.json"
    content = json.loads(record.read_text())
    content["config"]["teacher"] = None
    record.write_text(json.dumps(content))
    found = collect(run)
    assert tables.recoveries(found, found.evaluations[0][1]) == []


def test_what_was_pruned_in_rounds_is_pruned(tmp_path: Path) -> None:
    iterated = write_stage(tmp_path, "iterated", "iterate", seconds=90, minute=3, rounds=4)
    write_model(iterated, STUDENT)
    write_kept(iterated)
    (model,) = collect(tmp_path).models
    assert (model.role, len(model.kept["layers"])) == ("pruned", 28)


def test_the_run_may_have_moved(whole: Path, tmp_path: Path) -> None:
    """Paths in the records are those of the time; a copy elsewhere says the same."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(whole, moved)
    run = collect(moved)
    assert run.roles == {"teacher": "teacher", "pruned": "pruned", "random": "random", "distilled": "distilled"}
    assert len(tables.recoveries(run, run.evaluations[0][1])) == 1


def test_missing_stages_are_left_out(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_model(write_stage(run, "pruned", "prune", seconds=1, minute=0, method="random"), STUDENT)
    report.run(ReportConfig(run=str(run), output=str(tmp_path / "report")))
    page = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    assert {"losses", "scores", "training", "answers"}.isdisjoint(page.ids)
    assert {"pipeline", "shapes", "costs"} <= page.ids
    assert page.images == []
    assert not (tmp_path / "report" / "plots").exists()
    assert "recovered" not in " ".join(page.texts)


def test_a_gap_is_never_silent(tmp_path: Path) -> None:
    """What is there and cannot be read is named."""
    run = write_run(tmp_path / "run", steps=5)
    (run / "scores" / "scores.safetensors").write_bytes(b"short")
    (run / "evaluation" / "evaluation.json").write_text('{"models": {"a": {}}}')
    (run / "random" / "minitron.json").write_text("{")
    (run / "pruned" / "kept.json").write_text("[]")
    with (run / "distilled" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "kl":')
    record = json.loads((run / "evaluation" / "record.json").read_text())
    record["metrics"]["skipped_records"] = 3
    (run / "evaluation" / "record.json").write_text(json.dumps(record))
    (run / "broken").mkdir()
    (run / "broken" / "record.json").write_text("{}")
    found = report.run(ReportConfig(run=str(run), output=str(run / "report")))
    remarks = "\n".join(found["remarks"])
    for name in (
        "the scores of scores",
        "evaluation",
        "random/minitron.json",
        "kept units of pruned",
        "metrics.jsonl: 1",
        "broken",
        "evaluation left out 3 bad records of its data, which evaluation/skipped.jsonl lists",
    ):
        assert name in remarks, name
    text = (run / "report" / "index.html").read_text(encoding="utf-8")
    assert "Left out" in text
    Page(text)


def test_a_distillation_that_made_it_worse_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=5)
    path = run / "evaluation" / "evaluation.json"
    content = json.loads(path.read_text())
    content["models"]["distilled"]["loss"] = 9.0
    path.write_text(json.dumps(content))
    report.run(ReportConfig(run=str(run), output=str(run / "report")))
    text = (run / "report" / "index.html").read_text(encoding="utf-8")
    assert "distilled is worse than pruned" in text
    assert "won back" not in text


def test_benchmarks_are_shown_with_their_errors(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=5)
    path = run / "evaluation" / "evaluation.json"
    content = json.loads(path.read_text())
    metrics = {"acc": 0.3125, "acc_stderr": 0.0121, "em,strict": 0.25, "em_stderr,strict": 0.02}
    content["models"]["teacher"]["harness"] = {"arc_easy": {"metrics": metrics, "samples": 9}}
    content["models"]["distilled"]["harness"] = {"arc_easy": {"metrics": {"acc": 0.25}, "samples": 9}}
    path.write_text(json.dumps(content))
    table = benchmark_table(collect(run), content)
    assert table is not None
    assert table.headings == ["task", "metric", "teacher", "distilled"]
    assert table.rows == [
        ["arc_easy", "acc", "0.3125 ± 0.012", "0.25"],
        ["arc_easy", "em,strict", "0.25 ± 0.02", "–"],
    ]
    report.run(ReportConfig(run=str(run), output=str(run / "report")))
    assert "0.3125 ± 0.012" in (run / "report" / "index.html").read_text(encoding="utf-8")
    assert "| arc\\_easy | acc | 0.3125 ± 0.012 | 0.25 |" in (run / "report" / "report.md").read_text(encoding="utf-8")


def test_scores_of_few_units_and_zeros(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    run = tmp_path / "run"
    path = write_stage(run, "scores", "score", seconds=1, minute=0)
    write_scores(path)
    save_file({"ffn": np.zeros((1, 2)), "heads": np.ones((1, 1)), "layers": np.ones(1)}, path / "scores.safetensors")
    report.run(ReportConfig(run=str(run), output=str(run / "report")))
    assert len(Page((run / "report" / "index.html").read_text(encoding="utf-8")).images) == 2


def test_report_is_made_again_but_nothing_else_is_overwritten(whole: Path, tmp_path: Path) -> None:
    config = ReportConfig(run=str(whole), output=str(tmp_path / "report"))
    report.run(config)
    report.run(config)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="was not written by minitron"):
        report.run(ReportConfig(run=str(whole), output=str(tmp_path / "mine")))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run directory"):
        report.run(ReportConfig(run=str(tmp_path / "nowhere"), output=str(tmp_path / "out")))
    with pytest.raises(DataError, match="holds no finished stage"):
        report.run(ReportConfig(run=str(tmp_path), output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_plan(tmp_path: Path) -> None:
    plan = report.plan(ReportConfig(run=str(tmp_path / "run"), output=str(tmp_path / "out")))
    assert [Path(item.path).name for item in plan.writes] == ["index.html", "report.md"]
    assert plan.notes[0].endswith("(not there yet)")


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.21, "3.2 s"), (59.7, "1 min 00 s"), (134, "2 min 14 s"), (3720, "1 h 02 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert tables.duration(seconds) == text


def test_sizes_and_counts() -> None:
    assert [tables.size(n) for n in (None, 12, 1536, 5 * 2**30)] == ["–", "12 B", "1.5 KiB", "5.00 GiB"]
    assert [tables.count(n) for n in (999, 134_515_008, 7e12)] == ["999", "134.5 M", "7.0 T"]


def test_scores_of_a_mixture_and_of_other_estimators_are_drawn(tmp_path: Path) -> None:
    """Neurons of experts have a dimension more, and layers are not always scored by block influence."""
    import numpy as np

    from nemo_minitron.report import score_plots
    from nemo_minitron.report.run import ScoreSet

    run = collect(write_run(tmp_path / "run"))
    arrays = {"ffn": np.random.default_rng(0).random((3, 4, 10)), "layers": np.array([0.1, 0.3, 0.2])}
    scores = ScoreSet("mixture", arrays, {"estimator": "taylor"})
    neurons, layers = score_plots.neurons(scores, run), score_plots.layers(scores, run)
    assert neurons is not None and "(12 rows)" in neurons.alt
    assert layers is not None and layers.alt.startswith("First-order Taylor")
