"""Each message that the guide on troubles quotes is one of the code's, and each has a cause and a remedy beside it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
GAP = "\0"


def texts_of_the_code() -> list[str]:
    """All texts in the package; what is filled in, and texts that are added to others, are gaps."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) for part in node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return text(node.left) + text(node.right)
        return GAP

    found = []
    for path in (ROOT / "nemo_minitron").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        found += [text(node) for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp)]
    return [one for one in set(found) if one.strip(GAP)]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return texts_of_the_code()


def quoted() -> list[str]:
    return re.findall(r"^\*\*`(.*)`\*\*$", PAGE.read_text(encoding="utf-8"), re.M)


def is_said(message: str, texts: list[str]) -> bool:
    """Whether one text of the code has all that the quotation has between its gaps, in order.

    A gap of the quotation stands for anything; one of the code may be filled in, in the quotation, by words.
    """
    message = message.replace("``", "`")
    parts = [re.escape(part.strip()) for part in message.split("…") if re.search(r"\w{3}", part)]
    pattern = re.compile(".*".join(parts), re.S)
    return any(pattern.search(text) for text in texts)


def test_there_are_enough_and_each_has_an_answer() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(quoted()) >= 20
    assert len(quoted()) == text.count("\n**`") == len(re.findall(r"`\*\*\n: \S", text))


@pytest.mark.parametrize("message", quoted(), ids=lambda message: message[:50])
def test_the_code_says_it(message: str, texts: list[str]) -> None:
    assert is_said(message, texts), f"no text of the package says {message!r}"


def test_a_message_of_nobody_is_found(texts: list[str]) -> None:
    assert is_said("output: … already exists; choose another output or pass --overwrite", texts)
    assert not is_said("output: … is there already; choose another output", texts)
