"""A conversation with a model of any format, in one process, through the suite's own generation."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.config import ParallelLayout, Sampling
from nemo_minitron.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from transformers import PreTrainedTokenizerBase

    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.data.chat.conversations import Message
    from nemo_minitron.data.chat.templates import Template
    from nemo_minitron.runtime.groups import Groups

__all__ = ["Conversation", "Reply", "open_conversation"]

PLAIN = "none"
"""As a template: the conversation is plain text that the model goes on with."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: without special tokens.
        tokens: how many, an end token included.
        finish: "stop" after an end token, "length" where the answer or the context was full, "interrupted".
        dropped: turns that were left out of the conversation, the oldest first, so that it fits the context.
    """

    text: str
    tokens: int
    finish: str
    dropped: int = 0


@dataclasses.dataclass
class Conversation:
    """A model and what was said.

    Attributes:
        chunks, groups: the live model.
        tokenizer: of the model.
        ends: ids that end an answer.
        vocab_size, max_length: of the model.
        template: how a conversation becomes text; None for plain text.
        sampling: how answers are drawn. May be replaced between two turns.
        seed: of the draws; every answer of a conversation has draws of its own.
        system: system message.
        attributes: values that the answers shall have (SteerLM).
    """

    chunks: list[GPTModel]
    groups: Groups
    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...]
    vocab_size: int
    max_length: int
    template: Template | None
    sampling: Sampling
    seed: int = 1234
    system: str | None = None
    attributes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.turns: list[Message] = []
        self._answers = 0

    def reset(self) -> None:
        """Forget what was said."""
        self.turns = []

    def say(self, text: str, show: Callable[[str], None]) -> Reply:
        """Say something; the answer becomes part of the conversation. Collective, in a single process.

        Args:
            text: the user's turn.
            show: called with each further piece of the answer as it comes.

        Raises:
            DataError: for a turn that the template refuses, or that does not fit the model's context by itself. The
                conversation is as before then.
        """
        from nemo_minitron.data.chat.conversations import Message
        from nemo_minitron.generation import generate_tokens

        turns, dropped = [*self.turns, Message("user", text)], 0
        prompt = self._encode(turns)
        while len(prompt) >= self.max_length and len(turns) > 2:
            turns, dropped = turns[2:], dropped + 2  # a question and its answer
            prompt = self._encode(turns)
        if len(prompt) >= self.max_length:
            raise DataError(f"{len(prompt)} tokens leave no room for an answer in a context of {self.max_length}")
        stream = _Stream(self.tokenizer, self.ends, show)
        try:
            (answer,) = generate_tokens(
                self.chunks,
                self.groups,
                [prompt],
                sampling=self.sampling,
                seed=self.seed,
                ends=self.ends,
                vocab_size=self.vocab_size,
                max_length=self.max_length,
                requests=[self._answers],
                batch_size=1,
                stop=stream.take,
            )
            tokens, finish = answer.tokens, answer.finish
        except KeyboardInterrupt:
            tokens, finish = stream.tokens, "interrupted"
        self._answers += 1
        stream.finish(tokens)
        self.turns = [*turns, Message("assistant", stream.text.strip())]
        return Reply(stream.text.strip(), len(tokens), finish, dropped)

    def _encode(self, turns: list[Message]) -> list[int]:
        from nemo_minitron.data.chat.conversations import Message
        from nemo_minitron.data.chat.templates import prompt_ids

        if self.template is None:
            ids = list(self.tokenizer("\n".join(turn.content for turn in turns), verbose=False)["input_ids"])
        else:
            start = [] if self.system is None else [Message("system", self.system)]
            ids = list(
                prompt_ids([*start, *turns], self.tokenizer, self.template, self.attributes or None, where="the turn")
            )
        if not ids:
            raise DataError("gives no token; write something")
        return ids


class _Stream:
    """Turns the tokens of an answer into text as they come."""

    def __init__(self, tokenizer: Any, ends: tuple[int, ...], show: Callable[[str], None]) -> None:
        self.tokenizer, self.ends, self.show = tokenizer, frozenset(ends), show
        self.tokens: list[int] = []
        self.text = ""

    def take(self, tokens: list[int]) -> bool:
        """Show what is new; a character whose bytes are not all there yet waits."""
        self.tokens = list(tokens)
        text = self._text()
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._show(text)
        return False

    def finish(self, tokens: list[int]) -> None:
        """Show what waits."""
        self.tokens = list(tokens)
        self._show(self._text())

    def _text(self) -> str:
        ids = self.tokens[:-1] if self.tokens and self.tokens[-1] in self.ends else self.tokens
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _show(self, text: str) -> None:
        # Decoding more tokens may change what stood at the end; what is shown stays.
        if text.startswith(self.text) and len(text) > len(self.text):
            self.show(text[len(self.text) :])
            self.text = text


def open_conversation(
    path: str | Path,
    *,
    template: str = "own",
    sampling: Sampling | None = None,
    system: str | None = None,
    attributes: Mapping[str, int] | None = None,
    dtype: str = "float32",
    device: str = "auto",
    threads: int | None = None,
    seed: int = 1234,
    max_length: int | None = None,
) -> Conversation:
    """Load a model into this process and begin a conversation with it.

    Args:
        path: any checkpoint of the suite, or a GGUF file, whose numbers are taken as they dequantize.
        template: name of a chat template, "own" for the tokenizer's, "none" for plain text.
        sampling: how answers are drawn.
        system, attributes: see :class:`Conversation`.
        dtype, device: of the model.
        threads: of the processor; None takes all cores.
        seed: of the draws.
        max_length: tokens of the conversation; None takes the model's context.

    Raises:
        MinitronError: for a model that cannot be opened, has no tokenizer, or no such template.
    """
    import os

    import torch

    from nemo_minitron.checkpoints import load_into
    from nemo_minitron.data import load_tokenizer
    from nemo_minitron.data.chat.templates import choose_template, end_ids
    from nemo_minitron.runtime import cpu
    from nemo_minitron.runtime.groups import initialize
    from nemo_minitron.runtime.model import build_model
    from nemo_minitron.shape import uniform_faults

    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    cpu.prepare(device)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = _open(path, Path(scratch))
        if faults := uniform_faults(checkpoint.shape, "a conversation"):
            raise ConfigError(faults)
        tokenizer = load_tokenizer(checkpoint.tokenizer)
        chosen = None if template == PLAIN else choose_template(tokenizer, template)
        if chosen is None and (system is not None or attributes):
            raise ConfigError("system message and attributes: have no place in plain text; choose a template")
        ends = (tokenizer.eos_token_id,) if chosen is None else end_ids(tokenizer, chosen)
        context = checkpoint.architecture.max_position_embeddings
        groups = initialize(ParallelLayout(), seed=seed)
        chunks = build_model(checkpoint.shape, checkpoint.architecture, groups, dtype=getattr(torch, dtype))
        load_into(chunks, checkpoint, groups)
    return Conversation(
        chunks,
        groups,
        tokenizer,
        tuple(dict.fromkeys(end for end in (*ends, *checkpoint.architecture.end_tokens) if end is not None)),
        checkpoint.shape.vocab_size,
        min(max_length or context, context),
        chosen,
        sampling or Sampling(),
        seed,
        system,
        attributes or {},
    )


def _open(path: str | Path, scratch: Path) -> Checkpoint:
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.checkpoints.formats import detect

    entry = detect(Path(path).expanduser())
    if entry is None or entry.open is not None or entry.convert is None:
        return open_checkpoint(path)
    from nemo_minitron.runtime.requirements import require

    require(*entry.read_needs, for_=f"a {entry.title} file")
    return entry.convert(Path(path).expanduser(), scratch / "hf")
