"""How modules import each other, beyond what the contracts of import-linter say (``[tool.importlinter]``)."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import grimp
import pytest

from nemo_minitron.config import STAGES
from nemo_minitron.jobs.modules import stage_module


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """By module, what it imports: at its top or in a function; not for types alone."""
    graph = grimp.build_graph("nemo_minitron", exclude_type_checking_imports=True, cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules of which each imports the next, and the last is the first; empty where there are none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def test_no_import_circles(imports):
    """A module can be read, and tested, after those that it imports. The layers forbid circles between packages."""
    assert len(imports) > 200
    assert not (found := circle(imports)), " imports ".join(found)


def test_a_circle_is_found(imports):
    """The check itself: with one import more there is a circle."""
    (below,) = (name for name in imports["nemo_minitron.data.build"] if name == "nemo_minitron.data.blocks")
    changed = imports | {below: {*imports[below], "nemo_minitron.data.build"}}
    assert set(circle(changed)) == {below, "nemo_minitron.data.build"}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_its_module(stage):
    module = stage_module(stage)
    assert callable(module.plan)
    assert callable(module.run)
