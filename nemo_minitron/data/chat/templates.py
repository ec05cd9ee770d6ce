"""Chat templates, and conversations as tokens with the answers marked.

A template is data: jinja text as ``transformers`` runs it, the special tokens that it needs, the ends of an answer.
An answer's tokens are found without help from the template: render the conversation up to the answer, and up to the
question with the generation prompt; the answer is the text that the first has beyond the second. Answers of weight 0
are not marked. Tools, calls and thoughts go to the template, and what it does not write is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from nemo_minitron.data.bad_records import BadRecord
from nemo_minitron.data.chat.attributes import attribute_string, parse_attribute_string
from nemo_minitron.data.chat.conversations import Chat, Message
from nemo_minitron.errors import DataError
from nemo_minitron.runtime.limits import time_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["OWN", "TEMPLATES", "Rendered", "Template", "choose_template", "prompt_ids", "render"]

OWN = "own"
"""Names the template that the tokenizer carries; ``own:rag`` one that it carries under another name than "default"."""
DEFAULT, TOOL_USE = "default", "tool_use"
"""Names of templates in a tokenizer that carries several, as transformers chooses among them."""

#: Fields of a tool's result that only link it with its call, which stands before it.
_LINKS = ("name", "tool_call_id")


@dataclass(frozen=True)
class Template:
    """One chat template.

    Attributes:
        name: its name in configurations.
        jinja: the template, in the dialect of ``transformers``.
        tokens: special tokens that the tokenizer must have, each as one token.
        ends: tokens that end an answer; generation stops at them.
        label_start: text between the name of the assistant and the attribute values of its answer.
        with_tools: the template of conversations with tools; empty where it is the same.
    """

    name: str
    jinja: str
    tokens: tuple[str, ...]
    ends: tuple[str, ...]
    label_start: str = "Attributes: "
    with_tools: str = ""

    def of(self, tools: str) -> Template:
        """The template of conversations that may call these tools."""
        return replace(self, jinja=self.with_tools, with_tools="") if tools and self.with_tools else self


#: Named as NeMo-Aligner and the model cards name them.
TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template(
            "chatml",
            "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
            "'<|im_end|>\\n' }}{%- endfor %}"
            "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}",
            tokens=("<|im_start|>", "<|im_end|>"),
            ends=("<|im_end|>",),
        ),
        # Llama 3's model card: each header is followed by two line feeds, contents are stripped.
        Template(
            "llama3",
            "{{ '<|begin_of_text|>' }}{%- for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
            "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
            "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}",
            tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            ends=("<|eot_id|>",),
        ),
        # NeMo-Aligner's: a system turn always stands first, if empty; the next turn's start ends an answer. So each
        # turn here writes the start of the next one.
        Template(
            "nemotron",
            "{%- set first = messages[0]['role'] == 'system' %}{{ '<extra_id_0>System\\n' + "
            "(messages[0]['content'] if first else '') + '\\n<extra_id_1>' }}"
            "{%- for message in (messages[1:] if first else messages) %}"
            "{{ message['role'] | capitalize + '\\n' + message['content'] + '\\n<extra_id_1>' }}{%- endfor %}"
            "{%- if add_generation_prompt %}{{ 'Assistant\\n' }}{%- endif %}",
            tokens=("<extra_id_0>", "<extra_id_1>"),
            ends=("<extra_id_1>",),
            label_start="<extra_id_2>",
        ),
    )
}

SECONDS = 20.0
"""A template that takes longer for a conversation is refused: the loop of a file from elsewhere may have no end."""


class _EndlessTemplateError(DataError):
    """It is not tried again with less."""


class Rendered(NamedTuple):
    """A conversation as tokens.

    Attributes:
        ids: ``[n]``.
        answers: ``[n]`` bool: the token belongs to an answer of the assistant or ends it.
    """

    ids: list[int]
    answers: list[bool]


def choose_template(tokenizer: PreTrainedTokenizerBase, name: str = OWN) -> Template:
    """A template that this tokenizer can run.

    Args:
        tokenizer: of the model.
        name: of :data:`TEMPLATES`, or :data:`OWN`. Of several that the tokenizer carries that is "default", and
            "tool_use" for conversations with tools; ``own:NAME`` is another.

    Raises:
        DataError: for an unknown name, a tokenizer without a template of its own or without that one, or one that
            lacks special tokens which the template needs.
    """
    where = tokenizer.name_or_path or "the tokenizer"
    if name == OWN or name.startswith(f"{OWN}:"):
        return _own_template(tokenizer, name, where)
    if name not in TEMPLATES:
        raise DataError(f"template={name!r}: is not known; known: {OWN}, {OWN}:NAME, {', '.join(TEMPLATES)}")
    template = TEMPLATES[name]
    missing = [token for token in template.tokens if tokenizer.tokenize(token) != [token]]
    if missing:
        raise DataError(
            f"template={name}: {where} has no special token {', '.join(missing)}; choose another template, or add the "
            "tokens to the tokenizer and train them"
        )
    return template


def _own_template(tokenizer: PreTrainedTokenizerBase, name: str, where: str) -> Template:
    carried = tokenizer.chat_template
    if not carried:
        raise DataError(f"{where}: carries no chat template; set template to one of {', '.join(TEMPLATES)}")
    named: dict[str, str] = {DEFAULT: carried} if isinstance(carried, str) else dict(carried)
    wanted = name.removeprefix(OWN).removeprefix(":") or DEFAULT
    if wanted not in named:
        others = ", ".join(f"{OWN}:{other}" for other in named)
        raise DataError(f"template={name}: {where} carries no chat template {wanted!r}; set template to {others}")
    own = named[wanted]
    end = tokenizer.eos_token
    ends = [mark for mark in ("<|im_end|>", "<|eot_id|>", "<extra_id_1>") if mark in own]
    with_tools = named.get(TOOL_USE, "") if name == OWN else ""
    return Template(name, own, tokens=(), ends=tuple(ends or ([end] if end else [])), with_tools=with_tools)


def end_ids(tokenizer: PreTrainedTokenizerBase, template: Template) -> tuple[int, ...]:
    """Ids of the tokens that end an answer, the tokenizer's end of text among them."""
    ids = [tokenizer.convert_tokens_to_ids(mark) for mark in template.ends]
    return tuple(dict.fromkeys([*ids, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])]))


def prompt_ids(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    attributes: Mapping[str, int] | None = None,
    *,
    tools: str = "",
    where: str = "",
) -> list[int]:
    """Tokens of a prompt up to where the assistant begins to answer.

    Args:
        messages: the last one is the user's.
        tokenizer: of the model.
        template: as :func:`choose_template` gives it.
        attributes: values that the answer should have, for a model trained on attributes (SteerLM). With them, the
            values of earlier turns are written too.
        tools: as :attr:`Chat.tools`.
        where: file and place of the conversation, for faults.

    Raises:
        BadRecord: for a message that the template refuses; for fields of messages, or tools, that it does not write.
    """
    template = template.of(tools)
    with _placed(where or "chat"):
        _check_taken(messages, tools, tokenizer, template, prompt=True)
        _check_written(messages, tools, tokenizer, template)
        if attributes:
            messages = [turn._replace(content=_own_label(template, turn) + turn.content) for turn in messages]
        text = _text(messages, tokenizer, template, tools=tools, prompt=True) + _label(template, attributes)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def render(
    chat: Chat,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    last_answer_only: bool = False,
    labelled: bool = False,
) -> Rendered:
    """Tokens of a conversation, and which of them are answers.

    The ids are those that ``tokenizer.apply_chat_template`` gives. An answer's last token is the one that ends it;
    white space that the template puts behind that is not part of it.

    Args:
        chat: ends with an answer.
        tokenizer: a fast tokenizer (it gives the characters of each token).
        template: as :func:`choose_template` gives it.
        last_answer_only: leave the earlier answers unmarked.
        labelled: put the attribute values of the last answer before it, as :func:`prompt_ids` does, and those of
            earlier turns before them; they are not marked.

    Raises:
        BadRecord: where the template refuses a message, does not append turns, so that answers cannot be found, or
            does not write tools, calls or other fields of the conversation.
    """
    with _placed(chat.where or "chat"):
        text, spans = _spans(
            chat, tokenizer, template.of(chat.tools), last_answer_only=last_answer_only, labelled=labelled
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    answers = [
        any(start < high and end > low for low, high in spans) and end > start
        for start, end in encoded["offset_mapping"]
    ]
    return Rendered(encoded["input_ids"], answers)


def _spans(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, template: Template, *, last_answer_only: bool, labelled: bool
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and where in it the answers begin and end."""
    tools = chat.tools
    _check_taken(chat.messages, tools, tokenizer, template)
    _check_written(chat.messages, tools, tokenizer, template)
    labels = [_own_label(template, message) if labelled else "" for message in chat.messages]
    if labelled and chat.attributes:
        labels[-1] = _label(template, chat.attributes)
    messages = [
        message._replace(content=label + message.content) for message, label in zip(chat.messages, labels, strict=True)
    ]
    text = _text(messages, tokenizer, template, tools=tools)
    spans = []
    for number, message in enumerate(messages):
        last = number == len(messages) - 1
        if message.role != "assistant" or not message.trained or (last_answer_only and not last):
            continue
        before = _text(messages[:number], tokenizer, template, tools=tools, prompt=True) + labels[number]
        after = _text(messages[: number + 1], tokenizer, template, tools=tools)
        if not after.startswith(before) or not text.startswith(after):
            raise DataError(
                f"the template {template.name} changes earlier turns when one is added, so the answers cannot be told "
                f"from the rest; choose one of {', '.join(TEMPLATES)}"
            )
        if len(after.rstrip()) <= len(before):
            raise DataError(
                f"message {number + 1}: the template {template.name} does not write this answer, so nothing would be "
                "trained on; choose another template"
            )
        spans.append((len(before), len(after.rstrip())))
    return text, spans


@contextmanager
def _placed(where: str) -> Iterator[None]:
    """What is wrong with a conversation, with its place."""
    try:
        yield
    except DataError as error:
        raise BadRecord(where, str(error)) from None


def _own_label(template: Template, message: Message) -> str:
    return _label(template, parse_attribute_string(message.label)) if message.label else ""


def _label(template: Template, attributes: Mapping[str, int] | None) -> str:
    return f"{template.label_start}{attribute_string(attributes)}\n" if attributes else ""


def _check_taken(
    messages: Sequence[Message],
    tools: str,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    prompt: bool = False,
) -> None:
    """Raise a DataError where the template refuses the conversation, with the message that it refuses.

    That is the last one without which the template would take it; a template may refuse every beginning of a
    conversation, and then it is the first.
    """
    try:
        _text(messages, tokenizer, template, tools=tools, prompt=prompt)
        return
    except _EndlessTemplateError:
        raise
    except DataError as error:
        reason = error
    taken = 0
    for count in range(len(messages) - 1, 0, -1):
        try:
            _text(messages[:count], tokenizer, template, tools=tools)
        except DataError:
            continue
        taken = count
        break
    role = messages[taken].role
    remedy = (
        "put its text before that of the first user message"
        if role == "system"
        else "correct the roles, or remove the record"
    )
    raise DataError(f"message {taken + 1} ({role}): {reason}; {remedy}, or choose another template") from None


def _check_written(
    messages: Sequence[Message], tools: str, tokenizer: PreTrainedTokenizerBase, template: Template
) -> None:
    """Raise a DataError for what the template leaves out: its text is the same without it."""
    without: dict[str, tuple[Sequence[Message], str]] = {"tools": (messages, "")} if tools else {}
    for number, message in enumerate(messages):
        names = [name for name in message.fields if not (message.role == "tool" and name in _LINKS)]
        cut = {
            name: message._replace(more=json.dumps({key: it for key, it in message.fields.items() if key != name}))
            for name in names
        }
        if message.role == "tool":
            cut["content"] = message._replace(content="")
        for name, other in cut.items():
            changed = [*messages[:number], other, *messages[number + 1 :]]
            without[f"message {number + 1}: {name}"] = (changed, tools)
    if not without:
        return
    text, left_out = _text(messages, tokenizer, template, tools=tools), []
    for name, (others, fewer) in without.items():
        try:
            same = _text(others, tokenizer, template, tools=fewer) == text
        except DataError:  # the template needs it
            same = False
        if same:
            left_out.append(name)
    if left_out:
        raise DataError(
            f"{', '.join(left_out)}: the template {template.name} does not write it; choose a "
            "template that does, or remove it from the data"
        )


def _text(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    tools: str = "",
    prompt: bool = False,
) -> str:
    turns = [message.turn() for message in messages]
    more = {"tools": json.loads(tools)} if tools else {}
    try:
        with time_limit(SECONDS):
            text = tokenizer.apply_chat_template(
                turns, chat_template=template.jinja, tokenize=False, add_generation_prompt=prompt, **more
            )
    except TimeoutError as error:
        raise _EndlessTemplateError(f"template {template.name}: {error}; choose another template") from None
    except Exception as error:  # a tokenizer's own template raises what it pleases
        raise DataError(f"the template {template.name} refuses it ({type(error).__name__}: {error})") from None
    return str(text)
