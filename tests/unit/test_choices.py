"""The choices that the configuration offers are those that the code has; it cannot ask, since it imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nemo_minitron.checkpoints import formats
from nemo_minitron.config import parts
from nemo_minitron.config.describe import direct_settings
from nemo_minitron.config.parts import checks
from nemo_minitron.config.stages import PRUNE_METHODS, STAGES
from nemo_minitron.distillation.losses.states import STATE_LOSSES
from nemo_minitron.importance.aggregation import AGGREGATIONS
from nemo_minitron.pruning import choose

ROOT = Path(__file__).resolve().parents[2]


def test_choices_are_those_of_the_code():
    assert set(parts.AGGREGATIONS) == set(AGGREGATIONS)
    assert set(parts.FORMATS) == set(formats.written())
    assert set(checks.STATE_LOSSES) == set(STATE_LOSSES)
    assert PRUNE_METHODS == choose.METHODS


@pytest.mark.parametrize("config", [*STAGES.values()], ids=lambda config: config.STAGE)
def test_help_names_every_format(config):
    for setting in direct_settings(config):
        if setting.name in ("format", "formats"):
            # what a training writes besides its own NeMo 2 model
            expected = {*parts.FORMATS} - ({"nemo2"} if "besides" in setting.text else set())
            assert {f'"{name}"' for name in expected} <= set(re.findall(r'"\w+"', setting.text)), setting.name


def test_the_guide_describes_every_format():
    """A row of docs/checkpoints.md for each format that can be read or written."""
    guide = (ROOT / "docs" / "checkpoints.md").read_text()
    rows = set(re.findall(r"^\| `(\w+)` \|", guide, flags=re.MULTILINE))
    assert rows == set(formats.FORMATS)
