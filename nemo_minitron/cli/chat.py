"""``minitron chat``: talk to a model in a terminal, or answer the lines of a file or pipe."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from nemo_minitron.config import Sampling
from nemo_minitron.errors import CheckpointError, ConfigError, DataError, MinitronError

if TYPE_CHECKING:
    from nemo_minitron.serving import Conversation

__all__ = ["ChatOptions", "model_of", "talk"]

#: Commands of the conversation, with their help.
COMMANDS = {
    "/reset": "forget what was said",
    "/system TEXT": "set the system message, and forget what was said",
    "/set NAME=VALUE": "change how answers are drawn: temperature, top_p, top_k, greedy, max_new_tokens",
    "/help": "show these commands",
    "/quit": "end; so does the end of the input",
}


@dataclass(frozen=True)
class ChatOptions:
    """What the command line says.

    Attributes:
        sampling: how answers are drawn.
        system, template, attributes: see :func:`~nemo_minitron.serving.chat.open_conversation`.
        dtype, device, threads, seed: of the process.
        max_length: tokens of the conversation.
    """

    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None
    template: str = "own"
    attributes: dict[str, int] = field(default_factory=dict)
    dtype: str = "float32"
    device: str = "auto"
    threads: int | None = None
    seed: int = 1234
    max_length: int | None = None

    def faults(self) -> list[str]:
        """Values out of range."""
        faults = self.sampling.faults()
        for name, known in (("dtype", ("float32", "bfloat16")), ("device", ("auto", "cpu", "cuda"))):
            if (value := getattr(self, name)) not in known:
                faults.append(f"--{name}={value}: must be one of {', '.join(known)}")
        for name in ("threads", "max_length"):
            if (number := getattr(self, name)) is not None and number < 1:
                faults.append(f"--{name.replace('_', '-')}={number}: must be above 0")
        if self.seed < 0:
            faults.append(f"--seed={self.seed}: must be 0 or more")
        return faults


def model_of(path: str) -> str:
    """The model that a word of the command line means.

    Args:
        path: a checkpoint; a stage's output with a model in it; the directory of a run, for the model that it was for;
            or the name of a model in the cache of the Hugging Face Hub.

    Raises:
        CheckpointError: if there is none.
    """
    from nemo_minitron.checkpoints.formats import detect

    place = Path(path).expanduser()
    for candidate in (place, place / "model", place / "hf", place / "sft/model"):
        if candidate.exists() and detect(candidate) is not None:
            return str(candidate)
    if not place.is_dir():
        return path  # opening says what is wrong with it
    from nemo_minitron.report import collect

    try:
        result = collect(place).result
    except DataError:
        result = None
    if result is None or result.path is None or not result.path.exists():
        raise CheckpointError(f"{path}: holds neither a model nor a run that made one; name a checkpoint")
    return str(result.path)


def talk(path: str, options: ChatOptions, *, source: TextIO | None = None, target: TextIO | None = None) -> None:
    """Load a model and answer line by line until ``/quit`` or the end of the input.

    On a terminal the prompt is shown, and a line that ends in a backslash goes on. Answers go to ``target`` as they are
    generated; remarks go to the standard error.

    Args:
        path: see :func:`model_of`.
        options: of the command line.
        source, target: None for the standard input and output.

    Raises:
        MinitronError: for a model that cannot be opened, or options out of range. What is wrong with one line is said
            in a line, and the conversation goes on.
    """
    if faults := options.faults():
        raise ConfigError(faults)
    source, target = source or sys.stdin, target or sys.stdout
    conversation = _opened(model_of(path), options)
    terminal = source.isatty() and target.isatty()
    if terminal:
        _remark(f"{path}; /help shows the commands")
    for line in _lines(source, target, shown=terminal):
        if line.startswith("/"):
            if not _obey(line, conversation):
                return
        elif line.strip():
            _answer(line, conversation, target)


def _opened(path: str, options: ChatOptions) -> Conversation:
    from nemo_minitron.runtime.cpu.quiet import quiet
    from nemo_minitron.runtime.requirements import require
    from nemo_minitron.serving import open_conversation

    require("torch", "numpy", "transformers", "megatron", for_="chat")
    quiet()
    return open_conversation(
        path,
        template=options.template,
        sampling=options.sampling,
        system=options.system,
        attributes=options.attributes,
        dtype=options.dtype,
        device=options.device,
        threads=options.threads,
        seed=options.seed,
        max_length=options.max_length,
    )


def _lines(source: TextIO, target: TextIO, *, shown: bool) -> Iterator[str]:
    while True:
        if shown:
            target.write("> ")
            target.flush()
        try:
            line = source.readline()
            while shown and line.endswith("\\\n"):
                line = line[:-2] + "\n" + source.readline()
        except KeyboardInterrupt:  # at the prompt: of this line, not of the conversation
            target.write("\n")
            continue
        except UnicodeDecodeError as error:
            _remark(f"the line is no text in {error.encoding} ({error.reason})")
            continue
        if not line:
            if shown:
                target.write("\n")
            return
        yield line.rstrip("\n")


def _answer(line: str, conversation: Conversation, target: TextIO) -> None:
    def show(piece: str) -> None:
        target.write(piece)
        target.flush()

    try:
        reply = conversation.say(line, show)
    except DataError as error:
        _remark(str(error))
        return
    show("\n")
    if reply.dropped:
        _remark(f"the context is full: the first {reply.dropped} turns are left out")
    if reply.finish == "length":
        _remark(f"cut off after {reply.tokens} tokens (/set max_new_tokens=N)")


def _obey(line: str, conversation: Conversation) -> bool:
    """Carry out a command; False ends the conversation."""
    command, _, rest = line.strip().partition(" ")
    if command in ("/quit", "/exit"):
        return False
    if command == "/reset":
        conversation.reset()
    elif command == "/system" and conversation.template is not None:
        conversation.system = rest.strip() or None
        conversation.reset()
    elif command == "/system":
        _remark("a system message has no place in plain text")
    elif command == "/set":
        try:
            conversation.sampling = _changed(conversation.sampling, rest)
        except MinitronError as error:
            _remark(str(error))
    elif command == "/help":
        for name, text in COMMANDS.items():
            _remark(f"{name:16} {text}")
    else:
        _remark(f"{command} is no command; /help shows them")
    return True


def _changed(sampling: Sampling, words: str) -> Sampling:
    """Sampling with ``NAME=VALUE`` settings changed.

    Raises:
        ConfigError: for an unknown name, or a value out of range.
    """
    from nemo_minitron.parsing import parse_yaml

    fields = {entry.name: entry for entry in dataclasses.fields(Sampling)}
    values: dict[str, Any] = {}
    for word in words.split():
        name, _, text = word.partition("=")
        if name not in fields:
            raise ConfigError(f"{word}: is none of the settings {', '.join(f'{known}=VALUE' for known in fields)}")
        value = parse_yaml(text)
        if not isinstance(value, _KINDS.get(name, (int, float))) or (isinstance(value, bool) and name != "greedy"):
            raise ConfigError(f"{word}: is no value of {name}")
        values[name] = value
    if not values:
        raise ConfigError("/set NAME=VALUE: no setting is given")
    changed = dataclasses.replace(sampling, **values)
    if faults := changed.faults():
        raise ConfigError(faults)
    return changed


_KINDS: dict[str, tuple[type, ...]] = {"greedy": (bool,), "max_new_tokens": (int,), "top_k": (int, type(None))}


def _remark(text: str) -> None:
    print(f"minitron: {text}", file=sys.stderr, flush=True)
