"""A report of any part of a finished run: it is always written, whichever stages and files are gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.run_dir import write_aligned_run

from nemo_minitron.config import ReportConfig
from nemo_minitron.report import draw
from nemo_minitron.stages import report

STAGES = (
    "teacher", "scores", "search", "pruned", "random", "logits", "distilled", "evaluation", "sft", "export", "dpo",
    "aligned", "benchmarks",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_aligned_run(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture(autouse=True)
def small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn is the same; there are fewer pixels of it."""
    monkeypatch.setattr(draw, "DPI", 16)


def reported(whole: Path, out: Path, stages: set[str], gone: set[str]) -> tuple[str, str]:
    """Page and text of the report of these stages, without these files."""
    run = out / "run"
    for name in stages:
        shutil.copytree(whole / name, run / name)
    for file in gone:
        (run / file).unlink(missing_ok=True)
    report.run(ReportConfig(run=str(run), output=str(out / "report")))
    return (out / "report/index.html").read_text(), (out / "report/report.md").read_text()


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_report_of_any_stages_is_written(
    data: st.DataObject, whole: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stages = data.draw(st.sets(st.sampled_from(STAGES), min_size=1))
    files = sorted(
        str(file.relative_to(whole))
        for name in stages
        for file in (whole / name).rglob("*")
        if file.is_file() and file != whole / name / "record.json"
    )
    gone = data.draw(st.sets(st.sampled_from(files)) if files else st.just(set()))
    page, text = reported(whole, tmp_path_factory.mktemp("part"), stages, gone)
    for name in stages:
        assert f'<span class="name">{name}</span>' in page
        assert f"**{name}**" in text


def test_a_distillation_from_a_cache_has_its_cached_teacher(whole: Path, tmp_path: Path) -> None:
    page, text = reported(whole, tmp_path, {"teacher", "pruned", "logits", "distilled", "evaluation"}, set())
    assert "distilled recovered 57 % of the loss gap between pruned and teacher." in text
    assert "loss gap recovered" in page


def test_without_the_cache_the_teacher_is_not_known(whole: Path, tmp_path: Path) -> None:
    """Neither is the share of the gap; until now this was a TypeError."""
    moved = tmp_path / "moved"
    shutil.copytree(whole, moved)
    record = moved / "distilled/record.json"
    record.write_text(record.read_text().replace(str(whole / "logits"), "/gone/logits"))
    _, text = reported(moved, tmp_path, {"teacher", "pruned", "distilled", "evaluation"}, set())
    assert "recovered" not in text
    assert "| distilled | 3.842 |" in text
