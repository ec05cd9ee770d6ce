"""Conversations and preference pairs of the user: how many there are, how long they are, which template writes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.formats.nemo1.config import nemo1_families
from nemo_minitron.data.chat.conversations import Chat, read_chats, split_held_out
from nemo_minitron.data.chat.preferences import Preference, read_preferences
from nemo_minitron.data.chat.templates import OWN, TEMPLATES, Template, choose_template, render
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.errors import ConfigError, DataError
from nemo_minitron.planning import Model

__all__ = ["Answers", "check_alignable", "choose_built_in", "read_answers", "read_pairs"]

#: Samples whose lengths are taken; more are like them.
MEASURED = 2000
_SEED = 1234  # the default of ``data.seed``


@dataclass(frozen=True)
class Answers:
    """Samples to align on.

    Attributes:
        path: of the file.
        samples: how many there are.
        held_out: how many of them are held out at ``held_out_fraction``.
        held_out_fraction: share to hold out.
        template: name of the chat template.
        length: inputs of the longest, or, where a few are much longer, of nearly all samples.
        dropped: share of the samples that are longer than ``length``.
        why: of the template.
    """

    path: str
    samples: int
    held_out: int
    held_out_fraction: float
    template: str
    length: int
    dropped: float
    why: str

    @property
    def trained(self) -> int:
        """Samples that are trained on, about."""
        return int((self.samples - self.held_out) * (1 - self.dropped))


def check_alignable(model: Model, option: str) -> None:
    """Refuse a model that NeMo-Aligner cannot train.

    Raises:
        ConfigError: naming the option.
    """
    families, family = nemo1_families(), model.architecture.family
    if family not in families:
        raise ConfigError(
            f"{option}: NeMo-Aligner trains {', '.join(families)} models, this is a {family} model; leave it out"
        )


def choose_built_in(tokenizer: Any) -> tuple[str, str]:
    """The template of a tokenizer, and why: its own, or the first built-in one whose special tokens it has.

    Raises:
        DataError: if it can run none.
    """
    if tokenizer.chat_template:
        choose_template(tokenizer, OWN)
        return OWN, "the tokenizer carries a template"
    for name in TEMPLATES:
        try:
            choose_template(tokenizer, name)
        except DataError:
            continue
        return name, f"the tokenizer carries no template; it has the special tokens of {name}"
    needs = "; ".join(f"{name}: {' '.join(template.tokens)}" for name, template in TEMPLATES.items())
    raise DataError(
        "the model's tokenizer carries no chat template, and lacks the special tokens of the built-in ones "
        f"({needs}); add a chat_template to its tokenizer_config.json"
    )


def read_answers(path: str, tokenizer: Path, *, longest: int, unit: int = 1) -> Answers:
    """Conversations, of any form that ``minitron sft`` reads.

    Args:
        path: of the file.
        tokenizer: directory of the model's.
        longest: inputs that the model, or the memory, takes.
        unit: samples that a validation needs.

    Raises:
        DataError: for data that cannot be read, or that leave nothing to train on.
    """
    items = read_chats(path)
    return _measure(path, items, tokenizer, longest, unit, lambda chat: (chat,), last=False)


def read_pairs(path: str, tokenizer: Path, *, longest: int, unit: int = 1) -> Answers:
    """Preference pairs, as :func:`read_answers`."""
    items = read_preferences(path)
    return _measure(path, items, tokenizer, longest, unit, Preference.chats, last=True)


def _measure(
    path: str,
    items: Sequence[Any],
    directory: Path,
    longest: int,
    unit: int,
    chats: Callable[[Any], Sequence[Chat]],
    *,
    last: bool,
) -> Answers:
    tokenizer = load_tokenizer(directory)
    name, why = choose_built_in(tokenizer)
    template = choose_template(tokenizer, name)
    every = max(1, len(items) // MEASURED)
    lengths = sorted(_length(chats(item), tokenizer, template, last) for item in items[::every])
    top, most = lengths[-1], lengths[int(0.95 * (len(lengths) - 1))]
    kept = top if top <= min(longest, 2 * most) else min(longest, most)
    length = min(longest, -(-kept // 16) * 16)
    dropped = sum(count > length for count in lengths) / len(lengths)
    if dropped == 1:
        raise DataError(f"{path}: all {len(items)} samples are longer than {longest} tokens, which the model can take")
    fraction = min(0.5, max(0.1, 1.5 * unit / len(items)))
    train, held_out = split_held_out(items, fraction, _SEED)
    if len(held_out) < unit or len(train) < unit:
        raise DataError(
            f"{path}: its {len(items)} samples are too few to train on some and validate on others; give more of them, "
            "with other prompts"
        )
    return Answers(path, len(items), len(held_out), round(fraction, 3), name, length, dropped, why)


def _length(both: Sequence[Chat], tokenizer: Any, template: Template, last: bool) -> int:
    """Inputs of the longest; the last token is a label alone."""
    return max(len(render(chat, tokenizer, template, last_answer_only=last).ids) for chat in both) - 1
