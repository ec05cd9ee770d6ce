"""The code that docs/extending.md shows, as files of a package that is installed."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

__all__ = ["install_example"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"


def install_example(section: str, folder: Path) -> None:
    """Write the files of a section of the page into ``folder``, which then is a place where packages are installed.

    A block of code whose first line is ``# name`` is a file of that name; what ``pyproject.toml`` says of entry points
    is written as an installer writes it.
    """
    _, _, text = PAGE.read_text(encoding="utf-8").partition(f"\n## {section}\n")
    text = text.partition("\n## ")[0]
    folder.mkdir(parents=True, exist_ok=True)
    files = dict(re.findall(r"^```(?:python|toml)\n# (\S+)\n(.*?)^```$", text, re.M | re.S))
    assert files, f"{section}: no code there"
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    project = tomllib.loads(files["pyproject.toml"])["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [
        f"[{group}]\n" + "\n".join(f"{name} = {target}" for name, target in points.items())
        for group, points in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
