"""JSON and YAML that anybody may have written: a few bytes of them must neither end a reader nor keep it for long.

Both raise the errors that callers of ``json`` and ``yaml`` catch anyway.
"""

from __future__ import annotations

import json
from typing import Any

import yaml

__all__ = ["NESTED", "compose_yaml", "parse_json", "parse_yaml"]

#: How deep lists and mappings may lie in each other. Readers walk through them by recursion, which Python limits.
NESTED = 100
#: How many values the aliases of a YAML file may stand for: ten lines of them can stand for billions.
_ALIASED = 10_000


def parse_json(text: str | bytes) -> Any:
    """``json.loads``.

    Raises:
        json.JSONDecodeError: also for more nesting than :data:`NESTED`.
        ValueError: as ``json.loads``: bytes that are no text, numbers of thousands of digits.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        value = None
        deep = True
    else:
        brackets = (text.count("["), text.count("{")) if isinstance(text, str) else (text.count(b"["), text.count(b"{"))
        deep = sum(brackets) > NESTED and _is_deep(value)
    if deep:
        raise json.JSONDecodeError(f"more than {NESTED} lists and objects within each other", "", 0) from None
    return value


def parse_yaml(text: str | bytes) -> Any:
    """``yaml.safe_load``.

    Raises:
        yaml.YAMLError: also for what :func:`compose_yaml` refuses.
        ValueError: for values that are no value, such as the date 2026-99-99.
    """
    node = compose_yaml(text)
    if node is None:
        return None
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(node)
    except (TypeError, RecursionError) as error:  # a key that is a mapping, in forms that PyYAML does not look for
        raise yaml.YAMLError(f"no plain data ({next(iter(str(error).splitlines()), type(error).__name__)})") from error
    finally:
        loader.dispose()


def compose_yaml(text: str | bytes) -> yaml.Node | None:
    """``yaml.compose``: the nodes of a document, before aliases and merges (``<<``) are followed; None of an empty one.

    Raises:
        yaml.YAMLError: also for more nesting than :data:`NESTED`, and for aliases that stand for themselves or for
            thousands of values.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # bytes that are no text
        raise yaml.YAMLError(str(error)) from error
    if root is not None:
        _check_aliases(root)
    return root


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(NESTED):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _check_aliases(root: yaml.Node) -> None:
    """Count the values below each node with all aliases followed; a node that is met again stands for an alias."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()
    aliased = 0

    def size(node: yaml.Node, depth: int) -> int:
        nonlocal aliased
        if id(node) in open_nodes:
            raise yaml.MarkedYAMLError(problem="an alias stands for itself", problem_mark=node.start_mark)
        if id(node) in sizes:
            aliased += sizes[id(node)]
            return sizes[id(node)]
        if depth > NESTED:
            raise _too_deep(node.start_mark)
        open_nodes.add(id(node))
        total = 1
        for inner in _inner(node):
            total += size(inner, depth + 1)
        open_nodes.discard(id(node))
        sizes[id(node)] = total
        if aliased > _ALIASED:
            raise yaml.MarkedYAMLError(
                problem=f"its aliases stand for more than {_ALIASED:,} values", problem_mark=node.start_mark
            )
        return total

    size(root, 0)


def _inner(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _too_deep(mark: yaml.Mark | None = None) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=f"more than {NESTED} lists and mappings within each other", problem_mark=mark)
