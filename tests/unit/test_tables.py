"""Tables of what a setting names: the package's own entries, registered ones, and those of installed packages."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_minitron.config import LossConfig
from nemo_minitron.config.describe import direct_settings
from nemo_minitron.config.tables import ESTIMATORS, LOGIT_LOSSES, STATE_LOSSES, Table
from nemo_minitron.errors import ConfigError

FOREIGN = """
from nemo_minitron.distillation.losses.table import LogitLoss
LOSS = LogitLoss("foreign", reference=max, kernel=max, note="from outside")
"""
TABLES = [ESTIMATORS, LOGIT_LOSSES, STATE_LOSSES]


def installed(folder: Path, points: str, group: str = LOGIT_LOSSES.group) -> None:
    """A distribution in ``folder`` with entry points."""
    info = folder / "foreign_losses-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign-losses\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{points}\n")


def losses() -> Table:
    """A table as a new process has it."""
    return Table(
        LOGIT_LOSSES.what, own="nemo_minitron.distillation.losses.table:OWN_LOGIT_LOSSES", group=LOGIT_LOSSES.group
    )


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.what)
def test_names_are_those_of_the_entries(table: Table) -> None:
    assert {name: entry.name for name, entry in table.items()} == {name: name for name in table}
    assert len(table) == len(list(table)) > 1


@pytest.mark.parametrize(
    ("table", "page"), [(LOGIT_LOSSES, "distillation"), (STATE_LOSSES, "distillation"), (ESTIMATORS, "pruning")]
)
def test_the_guides_name_every_entry(table: Table, page: str) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / f"{page}.md").read_text(encoding="utf-8")
    rows = "\n".join(line for line in text.splitlines() if line.startswith("| `"))
    assert [name for name in table if not re.search(rf"\b{name}\b", rows)] == []


def test_help_names_what_there_is() -> None:
    texts = {setting.name: setting.text for setting in direct_settings(LossConfig)}
    assert all(f'"{name}"' in texts["kind"] for name in LOGIT_LOSSES)
    assert '"forward_kl" (the papers\' choice), "reverse_kl"' in texts["kind"]


def test_an_entry_is_registered_replaced_and_taken_out() -> None:
    table = losses()
    mine = dataclasses.replace(table["reverse_kl"], name="mine", note="of a test")
    assert table.register(mine) is mine
    assert table["mine"] is mine and "mine" in table and '"mine" (of a test)' in table.described()
    other = table.register(dataclasses.replace(mine, note=""))
    assert table["mine"] is other
    table.unregister("mine")
    assert "mine" not in table and "mine" not in list(table)
    with pytest.raises(KeyError):
        table["mine"]


def test_own_entries_stay() -> None:
    table = losses()
    with pytest.raises(ConfigError, match="'reverse_kl': is nemo_minitron's own; give yours another name"):
        table.register(dataclasses.replace(table["reverse_kl"], note="mine"))


def test_an_installed_package_adds_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foreign_losses.py").write_text(FOREIGN)
    installed(tmp_path, "foreign = foreign_losses:LOSS")
    monkeypatch.syspath_prepend(tmp_path)
    table = losses()
    assert "foreign" in table and list(table)[-1] == "foreign"
    assert table.described().endswith('or "foreign"')
    assert "foreign_losses" not in sys.modules  # its name is enough until the entry is needed
    assert table["foreign"].note == "from outside"
    assert table["foreign"] is sys.modules["foreign_losses"].LOSS
    del sys.modules["foreign_losses"]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (
            "foreign = nowhere_at_all:LOSS",
            r"'foreign': the installed package foreign-losses cannot be imported \(No mod",
        ),
        ("foreign = foreign_losses:NOTHING", r"cannot be imported \(.*no attribute 'NOTHING'\); mend or remove it"),
        ("another = foreign_losses:LOSS", "'another': .* names it 'foreign' in foreign_losses:LOSS; give both"),
    ],
)
def test_a_package_that_is_broken(points: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foreign_losses.py").write_text(FOREIGN)
    installed(tmp_path, points)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "foreign_losses", raising=False)
    with pytest.raises(ConfigError, match=message):
        losses()[points.split()[0]]


def test_tables_are_light_and_look_for_packages_at_an_unknown_name_alone() -> None:
    code = (
        "import sys, importlib.metadata as metadata\n"
        "looked = []\n"
        "real = metadata.entry_points\n"
        "metadata.entry_points = lambda **keys: looked.append(keys['group']) or real(**keys)\n"
        "from nemo_minitron.config import tables\n"
        "assert looked == ['nemo_minitron.stages'], looked  # the commands must be known at once\n"
        "looked.clear()\n"
        "for table in (tables.ESTIMATORS, tables.LOGIT_LOSSES, tables.STATE_LOSSES):\n"
        "    assert next(iter(table._own)) in table\n"
        "assert not looked, looked\n"
        "assert 'unknown' not in tables.LOGIT_LOSSES\n"
        "assert looked == ['nemo_minitron.losses'], looked\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
