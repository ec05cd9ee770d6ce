"""The type of a setting in words, and the dataclass of a list's items."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

__all__ = ["item_class", "type_words"]

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
    list: "a list",
}


def item_class(hint: Any) -> type[Any] | None:
    """``SourceConfig`` of ``list[SourceConfig]``, else None."""
    arguments = typing.get_args(hint)
    return arguments[0] if typing.get_origin(hint) is list and dataclasses.is_dataclass(arguments[0]) else None  # type: ignore[return-value]


def type_words(hint: Any) -> str:
    """A type in words: ``int | None`` -> "a whole number or null"."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join("null" if part is type(None) else type_words(part) for part in typing.get_args(hint))
    if dataclasses.is_dataclass(hint):
        return "a mapping"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return f"a list ({type_words(arguments[0])} each)" if arguments[0] is not Any else "a list"
    if origin is dict:
        return f"a mapping ({type_words(arguments[1])} each)" if arguments[1] is not Any else "a mapping"
    return _WORDS.get(hint, "anything")
