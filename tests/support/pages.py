"""The fenced blocks of README and guides, and the lines of set-up that stand before some of them in the page's source.

What a page says to a test, in comments that no reader sees, right before a block:

- ``<!-- set-up: CODE -->``: lines that run before a Python block, for what the text takes for granted.
- ``<!-- continues -->``: a Python block goes on with the names of the one before it.
- ``<!-- settings of STAGE -->``: a YAML block is a part of this stage's configuration (or ``slurm``, ``pipeline``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOT", "Block", "pages", "read_blocks"]

ROOT = Path(__file__).resolve().parents[2]

_BLOCK = re.compile(
    r"(?:^<!-- (?P<note>(?:(?!-->).)*?)\s*-->\n+)?^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: path below the top of the repository.
        line: of the first line of its content.
        language: as the fence says; empty without one.
        code: its content.
        note: the comment before it.
    """

    page: str
    line: int
    language: str
    code: str
    note: str = ""

    @property
    def name(self) -> str:
        """Page and line."""
        return f"{self.page}:{self.line}"

    @property
    def set_up(self) -> str:
        """Lines of Python to run before it."""
        return self.note.removeprefix("set-up:").strip("\n") if self.note.startswith("set-up:") else ""

    @property
    def continues(self) -> bool:
        """It has the names of the Python block before it."""
        return self.note == "continues"

    @property
    def settings_of(self) -> str | None:
        """The configuration that a YAML block is a part of."""
        return self.note.removeprefix("settings of ") if self.note.startswith("settings of ") else None

    @property
    def commands(self) -> list[str]:
        """Command lines of a shell block, without comments; a line that ends in a backslash goes on."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [line for raw in lines if (line := raw.removeprefix("$ ").split("  #")[0].strip()) and line[0] != "#"]


def pages() -> list[Path]:
    """README and every guide."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def read_blocks(page: Path) -> list[Block]:
    """The blocks of a page in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        name = page.relative_to(ROOT).as_posix()
        found.append(Block(name, line, match["language"], match["code"], match["note"] or ""))
    fences = re.findall(r"^ *```", text, re.M)
    assert len(fences) == 2 * len(found), f"{page.name}: {len(fences)} fences, {len(found)} blocks"
    return found
