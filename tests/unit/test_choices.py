"""The choices that the configuration offers are those that the code has; it cannot ask, since it imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nemo_minitron.checkpoints.formats import FORMATS
from nemo_minitron.config import parts
from nemo_minitron.config.describe import direct_settings
from nemo_minitron.config.stages import STAGES
from nemo_minitron.families import FAMILIES
from nemo_minitron.importance.aggregation import AGGREGATIONS

ROOT = Path(__file__).resolve().parents[2]


def test_choices_are_those_of_the_code():
    assert set(parts.AGGREGATIONS) == set(AGGREGATIONS)


@pytest.mark.parametrize("config", [*STAGES.values()], ids=lambda config: config.STAGE)
def test_help_names_every_format(config):
    for setting in direct_settings(config):
        if setting.name in ("format", "formats"):
            # what a training writes besides its own NeMo 2 model
            expected = {*parts.written_formats()} - ({"nemo2"} if "besides" in setting.text else set())
            assert {f'"{name}"' for name in expected} <= set(re.findall(r'"\w+"', setting.text)), setting.name


def test_the_guide_describes_every_format():
    """A row of docs/checkpoints.md for each format that can be read or written."""
    guide = (ROOT / "docs" / "checkpoints.md").read_text()
    rows = set(re.findall(r"^\| `(\w+)` \|", guide, flags=re.MULTILINE))
    assert rows == set(FORMATS)


def test_the_guide_describes_every_family():
    """A row of docs/model-families.md for each, as its entry says it."""
    guide = (ROOT / "docs" / "model-families.md").read_text()
    rows = {line.split("|")[1].strip(" `"): line for line in guide.splitlines() if line.startswith("| `")}
    assert list(rows) == list(FAMILIES)
    for name, family in FAMILIES.items():
        assert family.note and f"| {family.note} |" in rows[name]
        assert family.hf is not None and f"`{family.hf.architecture}`" in rows[name]
        assert family.nemo2 is not None and f"| `{family.nemo2.config}` |" in rows[name]
        assert rows[name].endswith("| no |" if family.nemo1 is None else "| yes |")
