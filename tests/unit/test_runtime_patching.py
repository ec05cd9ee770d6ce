"""Patches are applied before an importer sees a module, and leave nothing behind."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.runtime.cpu.patching import Patch, PatchSet

SOURCE = """
def plain():
    return "original"

flag = False

class Base:
    def inherited(self):
        return "base"

class Derived(Base):
    @staticmethod
    def static():
        return "static"

    def method(self):
        return "method"
"""


@pytest.fixture
def module_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = f"patched_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    (tmp_path / f"{name}_user.py").write_text(f"from {name} import plain\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    for loaded in (name, f"{name}_user"):
        sys.modules.pop(loaded, None)


def returning(value: Any) -> Any:
    def make(original: Any) -> Any:
        def replacement(*args: Any) -> Any:
            return value

        return replacement

    return make


def test_a_module_imported_later_is_patched_before_its_importer_sees_it(module_name: str) -> None:
    patches = PatchSet([Patch(module_name, "plain", returning("new"), "test")])
    patches.activate()
    user = importlib.import_module(f"{module_name}_user")
    assert user.plain() == "new"
    patches.deactivate()
    assert user.plain() == "original", "a copy taken while the set was active calls the original afterwards"
    patches.activate()
    assert user.plain() == "new"
    patches.deactivate()


def test_a_module_imported_after_deactivation_is_left_alone(module_name: str) -> None:
    patches = PatchSet([Patch(module_name, "plain", returning("new"), "test")])
    patches.activate()
    patches.deactivate()
    assert importlib.import_module(module_name).plain() == "original"


def test_everything_goes_back(module_name: str) -> None:
    module = importlib.import_module(module_name)
    before = {owner: dict(vars(owner)) for owner in (module, module.Base, module.Derived)}
    patches = PatchSet(
        [
            Patch(module_name, "plain", returning("new"), "test"),
            Patch(module_name, "flag", lambda original: True, "test"),
            Patch(module_name, "Derived.static", returning("new"), "test"),
            Patch(module_name, "Derived.method", returning("new"), "test"),
            Patch(module_name, "Derived.inherited", returning("new"), "test"),
            Patch(module_name, "created", returning("new"), "test", optional=True),
        ]
    )
    for _ in range(2):
        patches.activate()
        patches.activate()
        derived = module.Derived()
        assert module.flag is True
        assert {module.plain(), derived.static(), derived.method(), derived.inherited(), module.created()} == {"new"}
        assert module.Derived.static() == "new"
        assert module.Base().inherited() == "base"
        patches.deactivate()
        patches.deactivate()
        for owner, attributes in before.items():
            assert dict(vars(owner)) == attributes


def test_an_attribute_that_is_gone_upstream_is_named(module_name: str) -> None:
    importlib.import_module(module_name)
    patches = PatchSet([Patch(module_name, "absent", returning("new"), "test")])
    with pytest.raises(
        AttributeError, match=rf"{module_name}\.absent does not exist in the installed version .* docs/cluster\.md"
    ):
        patches.activate()
    patches.deactivate()
