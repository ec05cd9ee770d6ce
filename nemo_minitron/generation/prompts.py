"""Prompts of the user as conversations, and conversations as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.config import PromptsConfig
from nemo_minitron.data.bad_records import BadRecords, each
from nemo_minitron.data.chat.conversations import Chat, Message, read_chats, read_package_chats
from nemo_minitron.data.chat.templates import choose_template, end_ids, prompt_ids
from nemo_minitron.data.containers import JSON_KINDS, look, opened, says_text
from nemo_minitron.data.json_records import text_lines
from nemo_minitron.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PLAIN", "encode_prompts", "prompt_title", "read_prompts"]

PLAIN = "none"
"""Names no template: the question is the text that the model goes on with."""


def prompt_title(config: PromptsConfig) -> str:
    """Source of the prompts, for messages and plans."""
    return config.path or (f"package {config.package}" if config.package else "prompts.texts")


def read_prompts(config: PromptsConfig, *, system: str | None = None) -> list[Chat]:
    """The conversations to be answered, without their last answers.

    Args:
        config: their source; a file that is named as plain text (``.txt``, also compressed) has one question per line.
        system: system message for conversations without one.

    Raises:
        DataError: for a file that cannot be read, holds nothing or has bad lines, which are all named.
    """
    if config.texts is not None:
        chats = [_question(text, f"prompts.texts, item {number}") for number, text in enumerate(config.texts, 1)]
    elif config.package is not None:
        chats = read_package_chats(config.package, config.cache_dir)
    elif says_text(Path(str(config.path))):
        chats = _read_lines(Path(str(config.path)), skip=config.skip)
    else:
        chats = read_chats(str(config.path), answered=False, skip=config.skip)
    prompts = []
    for chat in chats[: config.limit]:
        messages = chat.prompt
        if system is not None and messages[0].role != "system":
            messages = (Message("system", system), *messages)
        prompts.append(replace(chat, messages=messages, attributes={}))
    return prompts


def _question(text: str, where: str) -> Chat:
    return Chat((Message("user", text),), where=where)


def _read_lines(path: Path, *, skip: bool) -> list[Chat]:
    container = look(path, plain=True)
    if container.kind not in (*JSON_KINDS, "text", "empty"):
        return read_chats(path, answered=False, skip=skip)
    bad = BadRecords(str(path), skip=skip)
    questions = []
    with opened(path, container.compression) as stream:
        for number, line, fault in text_lines(stream):
            if fault:
                bad.add(f"line {number}", DataError(fault), line)
            elif line.strip():
                questions.append(_question(line.strip(), f"{path}, line {number}"))
    bad.close(len(questions))
    return questions


def encode_prompts(
    chats: Sequence[Chat],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    *,
    title: str,
    max_length: int,
    attributes: Mapping[str, int] | None = None,
    skip: bool = False,
) -> tuple[list[tuple[Chat, list[int]]], tuple[int, ...]]:
    """Each prompt with its tokens, up to where the assistant begins, and the ids that end an answer.

    Args:
        chats: without last answers.
        tokenizer: of the model.
        template: name of a chat template, or :data:`PLAIN`.
        title: source of the chats, for messages.
        max_length: of prompt and answer together.
        attributes: values that the answers should have (SteerLM).
        skip: leave out prompts that cannot be used.

    Raises:
        DataError: for a template that the tokenizer cannot run, and for prompts that it refuses, that give no token,
            leave no room for an answer, or cannot be written as plain text; all of them with their places.
    """
    chosen = None if template == PLAIN else choose_template(tokenizer, template)

    def encode(chat: Chat) -> list[int]:
        if chosen is not None:
            ids = prompt_ids(chat.messages, tokenizer, chosen, attributes, tools=chat.tools, where=chat.where)
        elif len(chat.messages) == 1 and not chat.tools and not chat.messages[0].more:
            ids = tokenizer(chat.messages[0].content, verbose=False)["input_ids"]
        else:
            raise DataError("has several messages or tools, which plain text has no form for; choose a template")
        if not ids:
            raise DataError("gives no token; write a longer one")
        if len(ids) >= max_length:
            raise DataError(f"{len(ids)} tokens leave no room for an answer in a context of {max_length}")
        return list(ids)

    encoded = each(
        chats, encode, where=lambda chat: chat.where, record=lambda chat: chat.record(), title=title, skip=skip
    )
    if chosen is not None:
        return encoded, end_ids(tokenizer, chosen)
    return encoded, () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
