"""A pipeline as YAML with a comment at each choice."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

__all__ = ["Choice", "plain", "yaml_text"]

_WIDTH = 110


@dataclass(frozen=True)
class Choice:
    """A value and why it was chosen.

    Attributes:
        value: of the setting.
        why: one or more sentences.
    """

    value: Any
    why: str


def plain(value: Any) -> Any:
    """Values without their reasons."""
    if isinstance(value, Choice):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def yaml_text(head: Sequence[str], content: Mapping[str, Any]) -> str:
    """The file.

    Args:
        head: lines of its first comment.
        content: settings; a :class:`Choice` anywhere in it is written with its reason above.
    """
    lines = [line for text in head for line in _comment(text, 0)]
    for key, value in content.items():
        block = _entry(key, value, 0)
        lines += ["", *block] if isinstance(plain(value), dict | list) else block
    return "\n".join(lines) + "\n"


def _entry(key: str, value: Any, indent: int) -> list[str]:
    space, lines = " " * indent, []
    if isinstance(value, Choice):
        lines += _comment(value.why, indent)
        value = value.value
    if isinstance(value, Mapping | list | tuple) and not _is_flow(value, len(key) + indent):
        lines.append(f"{space}{key}:")
        if isinstance(value, Mapping):
            for inner, item in value.items():
                lines += _entry(inner, item, indent + 2)
        else:
            for number, item in enumerate(value):
                lines += [""] if number and not _is_flow(item, indent + 4) else []
                lines += _item(item, indent + 2)
        return lines
    return [*lines, f"{space}{key}: {_flow(value)}"]


def _item(value: Any, indent: int) -> list[str]:
    """An entry of a list."""
    lines = []
    if isinstance(value, Choice):
        lines += _comment(value.why, indent)
        value = value.value
    space = " " * indent
    if not isinstance(value, Mapping) or _is_flow(value, indent + 2):
        return [*lines, f"{space}- {_flow(value)}"]
    inner = [line for key, item in value.items() for line in _entry(key, item, indent + 2)]
    first = next(number for number, line in enumerate(inner) if not line.lstrip().startswith("#"))
    inner[first] = f"{space}- {inner[first].lstrip()}"
    # what is said of the first setting stands before the dash
    return [*lines, *(line[2:] for line in inner[:first]), *inner[first:]]


def _is_flow(value: Any, used: int) -> bool:
    """Whether a value stands in one line: short, without a reason or an interpolation in it."""
    if isinstance(value, Choice):
        return False
    if not isinstance(value, Mapping | list | tuple):
        return True
    if isinstance(value, Mapping) and "stage" in value:
        return False
    if _has_reason(value) or "${" in str(value):
        return False
    return len(_flow(value)) + used < _WIDTH


def _has_reason(value: Any) -> bool:
    if isinstance(value, Choice):
        return True
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(map(_has_reason, items))


def _flow(value: Any) -> str:
    text = yaml.safe_dump(
        plain(value), default_flow_style=True, sort_keys=False, width=float("inf"), allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...").strip()


def _comment(text: str, indent: int) -> list[str]:
    mark = f"{' ' * indent}# "
    if text.startswith("  "):  # a command, as it is
        return [mark + text]
    return textwrap.wrap(text, _WIDTH, initial_indent=mark, subsequent_indent=mark, break_on_hyphens=False) or ["#"]
