"""Function calling: one call, among the functions of the prompt (Berkeley Function-Calling Leaderboard, v4).

Answers are read as Python by :mod:`ast` and compared with the values that the data allow; nothing is evaluated. The
rules are those of the leaderboard's comparison by syntax tree (https://gorilla.cs.berkeley.edu/leaderboard.html).
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

from nemo_minitron.data.packages import archive_members
from nemo_minitron.errors import DataError
from nemo_minitron.evaluation.packs import Pack
from nemo_minitron.evaluation.packs.base import field_faults, json_lines, task_config

__all__ = ["call_is_right", "parse_call", "task"]

_LONGEST = 8000  # characters of an answer that are parsed
_WORDS = {"true": True, "false": False, "null": None}  # JSON's, which models write in place of Python's
_FENCE = re.compile(r"^```[a-z]*\n(.*?)```", re.DOTALL)
_TYPES: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "float": (float, int),  # Python takes an integer for a real number
    "string": (str,),
    "any": (str,),
    "boolean": (bool,),
    "array": (list,),
    "tuple": (list,),
    "dict": (dict,),
}

Call = tuple[str, dict[str, Any]]


def task(pack: Pack, cache_dir: Path) -> dict[str, Any]:
    """The leaderboard's ``simple_python`` (one function) or ``multiple`` (several to choose from)."""
    where = f"{pack.packages[0]}: BFCL_v4_{pack.option}.json"
    asked, answers = (content for _, content in archive_members(pack.packages[0], cache_dir))
    questions = json_lines(asked, where, {"id": str, "question": list, "function": list})
    truths = {
        line["id"]: line["ground_truth"]
        for line in json_lines(answers, f"{where}: possible answers", {"id": str, "ground_truth": list})
    }
    faults: list[str] = []
    documents = []
    for question in questions:
        if wrong := _faults(question, truths.get(question["id"])):
            faults += [f"{question['id']}: {fault}" for fault in wrong]
            continue
        documents.append(
            {
                "prompt": _prompt(question),
                # As text: the fields of different calls have nothing in common.
                "functions": json.dumps(question["function"]),
                "allowed": json.dumps(truths[question["id"]][0]),
            }
        )
    if faults:
        raise DataError("\n".join([f"{where}: {len(faults)} faults:", *(f"  - {fault}" for fault in faults[:20])]))
    return task_config(
        pack.name,
        documents,
        doc_to_text=lambda doc: doc["prompt"],
        doc_to_target=lambda doc: doc["allowed"],
        process_results=_score,
        metrics={"acc": "mean"},
        until=["\n\n"],
        max_new_tokens=256,
    )


def parse_call(text: str) -> Call | None:
    """Name and arguments of the call that the answer consists of; None if the answer is anything else.

    Accepted are ``f(a=1)``, ``[f(a=1)]``, and both inside a fence of backticks. Arguments are literals given by name.
    """
    text = text.strip()[:_LONGEST]
    if fenced := _FENCE.match(text):
        text = fenced[1]
    try:
        tree = ast.parse(text.strip("` \n"), mode="eval").body
        if isinstance(tree, ast.List) and len(tree.elts) == 1:
            tree = tree.elts[0]
        if not isinstance(tree, ast.Call) or tree.args:
            return None
        arguments = {word.arg: ast.literal_eval(_Words().visit(word.value)) for word in tree.keywords if word.arg}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    if len(arguments) < len(tree.keywords):  # given twice, or `**more`
        return None
    name = _dotted(tree.func)
    return None if name is None else (name, {key: _lists(value) for key, value in arguments.items()})


def call_is_right(call: Call | None, functions: list[dict[str, Any]], allowed: dict[str, dict[str, list[Any]]]) -> bool:
    """Whether the data allow a call.

    Args:
        call: of :func:`parse_call`.
        functions: descriptions; names, ``parameters.properties`` with their types, ``parameters.required``.
        allowed: ``{name: {argument: values}}``; an argument with "" among its values may be left out.
    """
    ((name, values),) = allowed.items()
    if call is None or call[0] != name:
        return False
    parameters = next(function["parameters"] for function in functions if function["name"] == name)
    given = call[1]
    if any(required not in given for required in parameters["required"]):
        return False
    if any(argument not in given and "" not in choices for argument, choices in values.items()):
        return False
    return all(
        argument in values
        and argument in parameters["properties"]
        and _typed(value, parameters["properties"][argument]["type"], values[argument])
        and any(_equal(value, choice) for choice in values[argument])
        for argument, value in given.items()
    )


class _Words(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(_WORDS[node.id]) if node.id in _WORDS else node


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := _dotted(node.value)) is not None:
        return f"{before}.{node.attr}"
    return None


def _lists(value: Any) -> Any:
    """Tuples as lists, which is what the data's JSON made of them."""
    if isinstance(value, list | tuple):
        return [_lists(item) for item in value]
    return {key: _lists(item) for key, item in value.items()} if isinstance(value, dict) else value


def _typed(value: Any, declared: str, choices: list[Any]) -> bool:
    """Whether a value has the declared type, or, for the name of a variable, the type of an allowed value."""
    kinds = {type(choice) for choice in choices if choice != ""}
    return type(value) in _TYPES[declared] or type(value) in kinds


def _equal(value: Any, choice: Any) -> bool:
    """Whether two values are equal: strings without case, spaces and ``,./-_*^``; dictionaries have choices per key."""
    if isinstance(value, bool) is not isinstance(choice, bool):
        return False
    if isinstance(value, str) and isinstance(choice, str):
        return _plain(value) == _plain(choice)
    if isinstance(value, list) and isinstance(choice, list):
        # Within a list the leaderboard does not take an integer for a real number.
        return len(value) == len(choice) and all(
            type(item) is type(other) and _equal(item, other) for item, other in zip(value, choice, strict=True)
        )
    if isinstance(value, dict) and isinstance(choice, dict):
        options = {key: item if isinstance(item, list) else [item] for key, item in choice.items()}
        return all(key in value or "" in some for key, some in options.items()) and all(
            key in options and any(_equal(item, option) for option in options[key]) for key, item in value.items()
        )
    return value == choice


def _plain(text: str) -> str:
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')


def _prompt(question: dict[str, Any]) -> str:
    asked = "\n".join(message["content"] for message in question["question"][0])
    listed = "\n".join(json.dumps(function, ensure_ascii=False) for function in question["function"])
    return (
        f"These functions can be called:\n{listed}\n\n"
        "Answer the request with one call in Python's form, arguments by name, as in "
        "[function(argument=1, other='text')], and with nothing else.\n\n"
        f"Request: {asked}\nCall:"
    )


def _score(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
    right = call_is_right(parse_call(answers[0]), json.loads(doc["functions"]), json.loads(doc["allowed"]))
    return {"acc": float(right)}


def _faults(question: dict[str, Any], truth: Any) -> list[str]:
    """Missing parts of a question, without which it cannot be asked or checked."""
    turns = question["question"]
    faults = []
    if len(turns) != 1 or not isinstance(turns[0], list) or not turns[0]:
        faults.append("question is not of one turn")
    else:
        faults += [fault for message in turns[0] for fault in field_faults(message, {"role": str, "content": str})]
    names = set()
    for function in question["function"]:
        if missing := field_faults(function, {"name": str, "parameters": dict}):
            faults += missing
            continue
        names.add(function["name"])
        faults += field_faults(function["parameters"], {"properties": dict, "required": list})
        for argument, described in function["parameters"].get("properties", {}).items():
            if not isinstance(described, dict) or described.get("type") not in _TYPES:
                faults.append(f"argument {argument} of {function['name']} has no type that is known")
    if not isinstance(truth, list) or len(truth) != 1 or not isinstance(truth[0], dict) or len(truth[0]) != 1:
        return [*faults, "not one possible answer"]
    ((name, values),) = truth[0].items()
    if name not in names:
        faults.append(f"the answer calls {name}, which is not described")
    if not isinstance(values, dict) or not all(isinstance(value, list) for value in values.values()):
        faults.append("the answer's values are not lists")
    return faults
