"""The choices that the configuration offers are those that the code has; it cannot ask, since it imports no torch."""

from __future__ import annotations

from nemo_minitron import checkpoints
from nemo_minitron.config import parts
from nemo_minitron.config.parts import checks
from nemo_minitron.config.stages import PRUNE_METHODS
from nemo_minitron.distillation.losses.states import STATE_LOSSES
from nemo_minitron.importance.aggregation import AGGREGATIONS
from nemo_minitron.pruning import choose


def test_choices_are_those_of_the_code():
    assert set(parts.AGGREGATIONS) == set(AGGREGATIONS)
    assert set(parts.FORMATS) == set(checkpoints.FORMATS)
    assert set(checks.STATE_LOSSES) == set(STATE_LOSSES)
    assert PRUNE_METHODS == choose.METHODS
