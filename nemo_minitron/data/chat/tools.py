"""Tools of a conversation and calls of them, in the form in which ``transformers`` hands them to a chat template."""

from __future__ import annotations

import json
from typing import Any

from nemo_minitron.accounting import Noted
from nemo_minitron.data.chat.fields import Unknown, blank, shown
from nemo_minitron.errors import DataError
from nemo_minitron.parsing import parse_json

__all__ = ["parse_calls", "parse_tools"]

#: Harmless fields of a call; they go to the template with it.
_CALL_FIELDS = {"id": "links the call with its result", "index": "the place in the list"}


def parse_tools(value: Any) -> str:
    """The tools that a conversation may call, as JSON; empty for none.

    Args:
        value: a list of ``{"type": "function", "function": {...}}`` or of ``{"name": ..., ...}``, or such a list as
            JSON text.

    Raises:
        DataError: for anything else.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except ValueError:
            raise DataError(f"tools={shown(value)} is no JSON; write the list of tools") from None
    if blank(value) or (isinstance(value, str) and not value.strip()):
        return ""
    if not isinstance(value, list):
        raise DataError(f"tools is {type(value).__name__}; write the list of tools")
    tools = []
    for number, tool in enumerate(value, 1):
        tool = {"type": "function", "function": tool} if isinstance(tool, dict) and "function" not in tool else tool
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f'tools, {number}: {shown(value[number - 1])} is no {{"type": "function", "function": '
                            '{"name": ...}}; correct it')  # fmt: skip
        tools.append(tool)
    return json.dumps(tools)


def parse_calls(value: Any, name: str, unknown: Unknown) -> list[dict[str, Any]]:
    """Calls of a message, their arguments as an object: templates write that as JSON.

    Args:
        value: a list of ``{"function": {"name": ..., "arguments": object or JSON text}}`` or of the inner objects.
        name: the message, for faults.
        unknown: where unknown fields go.

    Raises:
        DataError: for anything else.
    """
    if not isinstance(value, list):
        raise DataError(f"{name}: tool_calls is {type(value).__name__}; write a list")
    calls = []
    for number, call in enumerate(value, 1):
        place = f"{name}, call {number}"
        if not isinstance(call, dict):
            raise DataError(f"{place}: is {type(call).__name__}, not an object with function")
        outer = Noted(call)
        if call.get("type") not in (None, "function"):
            raise DataError(f"{place}: type={outer['type']!r}; only calls of a function are known")
        outer.get("type")
        inner = outer
        if "function" in call:
            if not isinstance(outer["function"], dict):
                raise DataError(f"{place}: function is {type(call['function']).__name__}, not an object")
            inner = Noted(outer["function"])
        if not isinstance(inner.get("name"), str):
            raise DataError(f"{place}: has no name of its function")
        function = {"name": inner["name"], "arguments": _arguments(inner.get("arguments"), place)}
        for given in {id(outer): outer, id(inner): inner}.values():
            unknown.account(given, _CALL_FIELDS, kind="call", place=place)
        kept = {key: call[key] for key in ("id", "index") if call.get(key) is not None}
        calls.append({**kept, "type": "function", "function": function})
    return calls


def _arguments(value: Any, place: str) -> dict[str, Any]:
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError:
            raise DataError(f"{place}: arguments={shown(value)} is no JSON; correct it") from None
    if not isinstance(value, dict):
        raise DataError(f"{place}: arguments={shown(value)} is no JSON object; correct it")
    return value
