"""The guide's table of settings of a distillation that go together, against what a configuration refuses."""

from __future__ import annotations

import re

import pytest
from support.pages import ROOT

from nemo_minitron.config import (
    CorrectionConfig,
    DataConfig,
    DistillConfig,
    IntermediateConfig,
    OnPolicyConfig,
    OnPolicyPrompts,
    SourceConfig,
    TeacherConfig,
)

SETTINGS = {
    "`teacher_cache`": {"teacher": None, "teacher_cache": "logits"},
    "`teachers`": {"teacher": None, "teachers": [TeacherConfig("a", "a"), TeacherConfig("b", "b")]},
    "`on_policy`": {"on_policy": OnPolicyConfig(0.5, OnPolicyPrompts(texts=["Why?"]))},
    "`logits: chunks`": {"logits": "chunks"},
    "`quantize`": {"quantize": "int4"},
    "losses inside the models": {"intermediate": IntermediateConfig(hidden="mse")},
    "`teacher_correction`": {"teacher_correction": CorrectionConfig(lr=1e-5)},
}
WEIGHED = OnPolicyConfig(0.5, OnPolicyPrompts(texts=["Why?"]), refresh=4, max_age=1, stale="reweight")


def faults(*settings: dict[str, object]) -> list[str]:
    made: dict[str, object] = {"student": "s", "teacher": "t", "output": "o"}
    made["data"] = DataConfig(sources=[SourceConfig("text", path="text.jsonl")])
    for setting in settings:
        made |= setting
    return DistillConfig(**made).faults()  # type: ignore[arg-type]


def table() -> dict[tuple[str, str], str]:
    page = (ROOT / "docs/distillation.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \|$", page.split("What goes together:")[1].split("\n\n## ")[0], re.M)
    head, *body = ([cell.strip() for cell in re.split(r" ?\| ?", row)] for row in rows)
    return {
        (row[0], name): cell for row in body for name, cell in zip(head[1:], row[1:], strict=True) if row[0] != name
    }


TABLE = table()


def test_the_table_is_of_these_settings() -> None:
    assert {name for pair in TABLE for name in pair} == set(SETTINGS)
    assert all(faults(setting) == [] for setting in SETTINGS.values())
    assert faults(*list(SETTINGS.values())[-3:]) == []


@pytest.mark.parametrize(
    ("pair", "said"), TABLE.items(), ids=lambda value: "" if isinstance(value, str) else str(value)
)
def test_the_table_says_what_is_refused(pair: tuple[str, str], said: str) -> None:
    first, second = (SETTINGS[name] for name in pair)
    if said == "unless answers are weighed":
        assert faults(first, second) == []
        assert faults(first, second, {"on_policy": WEIGHED})
        assert faults({"on_policy": WEIGHED}) == []
        return
    assert said == ("no" if faults(first, second) else "yes")
