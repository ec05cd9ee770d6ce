"""A warm-up that nobody asked for fits the training, and outputs keep the identities that they had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_minitron.config import (
    STAGES,
    ChatDataConfig,
    CorrectConfig,
    DataConfig,
    DistillConfig,
    DpoConfig,
    IterateConfig,
    PruneConfig,
    SearchConfig,
    SftConfig,
    SourceConfig,
    StageConfig,
    TargetConfig,
    load,
)
from nemo_minitron.config.parts import AlignmentSchedule, Schedule, ShortSchedule
from nemo_minitron.errors import ConfigError
from nemo_minitron.jobs.records import identity_of, write_record

TEXT = DataConfig(sources=[SourceConfig("a", path="a.txt")])
CHATS = ChatDataConfig(path="c.jsonl")
COMMON: dict[str, Any] = {"output": "o", "model": "m"}

#: Identities of the release whose default was a warm-up of 10 steps, and which had no target of a search.
EARLIER: dict[str, tuple[StageConfig, str]] = {
    "prune": (
        PruneConfig(**COMMON, scores="s", target=TargetConfig(num_layers=2, hidden_size=64)),
        "d9f545dc443db680",
    ),
    "iterate": (IterateConfig(**COMMON, data=TEXT, target=TargetConfig(num_layers=2)), "2bb89a4915b501eb"),
    "distill": (DistillConfig(output="o", student="s", teacher="t", data=TEXT, steps=11), "1c5d0ae1714e9ddc"),
    "cache": (DistillConfig(output="o", student="s", teacher_cache="c", data=TEXT), "92723936fec6ddc4"),
    "correct": (CorrectConfig(**COMMON, data=TEXT, warmup_steps=3, steps=5), "5206a0b6a2b57f23"),
    "sft": (SftConfig(**COMMON, data=CHATS), "0e50990b425b776f"),
    "dpo": (DpoConfig(**COMMON, data=CHATS, steps=20), "06e02dbe45a0d67f"),
    "steerlm": (STAGES["steerlm"](**COMMON, data=CHATS), "67f92a36b7907d03"),
    "search": (SearchConfig(**COMMON, scores="s", data=TEXT), "ab4e9e5718990858"),
}


@pytest.mark.parametrize("name", EARLIER)
def test_earlier_outputs_keep_their_identity(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # inputs of these names are nowhere
    config, digits = EARLIER[name]
    assert identity_of(config)["hash"].startswith(digits)


@given(st.integers(1, 400))
def test_every_number_of_steps_has_a_warm_up(steps: int) -> None:
    for schedule in (ShortSchedule(steps=steps), Schedule(steps=steps), AlignmentSchedule(steps=steps)):
        assert schedule.faults() == []
        assert schedule.warmup() == (10 if steps > 10 else steps // 2)
        assert schedule.warmup() < steps
    data_decides = AlignmentSchedule()
    assert data_decides.warmup(steps) == Schedule(steps=steps).warmup()
    assert (data_decides.warmup(), AlignmentSchedule(warmup_steps=7).warmup(steps)) == (10, 7)


def test_a_warm_up_that_was_asked_for_is_not_changed() -> None:
    (fault,) = Schedule(steps=5, warmup_steps=5).faults()
    assert fault == "warmup_steps=5: leaves nothing of steps=5; lower it, or leave it out"


@pytest.mark.parametrize("steps", [1, 3, 300])
@pytest.mark.parametrize("stage", ["correct", "distill", "sft", "dpo", "reward", "steerlm", "steerlm2", "search"])
def test_short_trainings_need_no_further_setting(stage: str, steps: int, tmp_path: Path) -> None:
    """The first thing that is tried with a configuration is a short run of it."""
    group = "distill." if stage == "search" else ""
    assert load(stage, stage, [f"{group}steps={steps}", f"{group}warmup_steps=null"])


def test_the_record_says_the_warm_up_that_was_run(tmp_path: Path) -> None:
    config = CorrectConfig(output=str(tmp_path / "o"), model="m", data=TEXT, steps=5)
    record = write_record(config, identity_of(config), {}, 1.0)
    assert (config.warmup_steps, record["config"]["warmup_steps"], record["settings"]["warmup_steps"]) == (None, 2, 2)
    assert record["config"]["data"]["sources"][0]["path"] == "a.txt"


@pytest.mark.parametrize("lines", ["teacher_cache: c", "loss: {label_weight: 1.0}", "teacher_cache: c\nteacher: t"])
def test_a_teacher_is_not_asked_for_where_none_is_read(lines: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"student: s\noutput: o\ndata: {{sources: [{{name: a, path: a.txt}}]}}\n{lines}\n")
    assert load("distill", path)
    path.write_text(path.read_text().replace(lines, ""))
    with pytest.raises(ConfigError) as refused:
        load("distill", path)
    (fault,) = refused.value.faults
    assert fault.startswith("teacher: none is given; name a checkpoint or a teacher_cache")
