"""Role play in two turns (MT-Bench: Zheng et al., arXiv:2306.05685): answers for people to read.

The benchmark's scores are given by a judge model, which is not run here: there are answers and no score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.data.packages import archive_members
from nemo_minitron.errors import DataError
from nemo_minitron.evaluation.packs import Pack
from nemo_minitron.evaluation.packs.base import VERSION, json_lines

__all__ = ["Conversation", "answer_turns", "conversations"]

MAX_NEW_TOKENS = 256
_CATEGORY = "roleplay"


@dataclass(frozen=True)
class Conversation:
    """What a user says, turn by turn.

    Attributes:
        number: number of the question in the benchmark.
        turns: the user's turns.
    """

    number: int
    turns: tuple[str, ...]


def conversations(pack: Pack, cache_dir: Path) -> list[Conversation]:
    """The benchmark's questions of role play."""
    ((name, content),) = archive_members(pack.packages[0], cache_dir)
    where = f"{pack.packages[0]}: {name}"
    lines = json_lines(content, where, {"question_id": int, "category": str, "turns": list})
    chosen = [
        Conversation(line["question_id"], tuple(line["turns"])) for line in lines if line["category"] == _CATEGORY
    ]
    if not chosen:
        raise DataError(f"{where}: no questions of the category {_CATEGORY!r}; the package is not the pinned one")
    if bad := [
        line.number for line in chosen if not line.turns or not all(isinstance(turn, str) for turn in line.turns)
    ]:
        raise DataError(f"{where}: questions {', '.join(map(str, bad))}: turns are not texts")
    return chosen


def answer_turns(
    asked: Sequence[Conversation],
    generate: Callable[[list[str], list[str]], list[str]],
    template: Callable[[list[dict[str, str]]], str] | None,
) -> dict[str, Any]:
    """Ask one turn after another, each after the answers to the turns before it.

    Args:
        asked: conversations.
        generate: ``(prompts, stop texts) -> answers``.
        template: makes the prompt of the next answer from a conversation; None writes "User:" and "Assistant:".

    Returns:
        A result in the form of the harness's: no metrics, and ``answers``, a record ``{question, turns, answers}``
        a conversation.
    """
    answers: list[list[str]] = [[] for _ in asked]
    for turn in range(max(len(conversation.turns) for conversation in asked)):
        open_ones = [number for number, conversation in enumerate(asked) if turn < len(conversation.turns)]
        prompts = []
        for number in open_ones:
            messages = []
            for spoken, said in enumerate(asked[number].turns[: turn + 1]):
                messages.append({"role": "user", "content": said})
                if spoken < turn:
                    messages.append({"role": "assistant", "content": answers[number][spoken]})
            prompts.append(_plain(messages) if template is None else template(messages))
        for number, answer in zip(open_ones, generate(prompts, [] if template else ["\nUser:"]), strict=True):
            answers[number].append(answer.strip())
    return {
        "metrics": {},
        "samples": len(asked),
        "num_fewshot": 0,
        "version": VERSION,
        "answers": [
            {"question": conversation.number, "turns": list(conversation.turns), "answers": said}
            for conversation, said in zip(asked, answers, strict=True)
        ],
    }


def _plain(messages: list[dict[str, str]]) -> str:
    turns = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
    return "\n".join([*turns, "Assistant:"])
