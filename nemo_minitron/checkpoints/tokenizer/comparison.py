"""Whether two models read token ids alike, and which ids they have in common.

Models of one tokenizer may differ in rows of the embedding (padding), in added tokens, in the text of reserved tokens,
in the tokens that begin, end and fill a text, and in chat templates. Such differences are named in one warning, and
:class:`CommonVocabulary` holds them. Differences in what ordinary text becomes are refused: other tokens or ids, other
merges or scores, other ids of the :data:`PROBES`.

Tokenizers are compared as data, by the paths of their files; only probes need the ``tokenizers`` library. Torch and
transformers are not imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.tokenizer.description import (
    TokenizerContent,
    carried_templates,
    named_specials,
    read_content,
    same_files,
)
from nemo_minitron.checkpoints.tokenizer.opening import origin
from nemo_minitron.errors import CheckpointError

__all__ = ["PROBES", "CommonVocabulary", "Vocabulary", "compare", "warnings_of"]

PROBES = (
    "The quick brown fox jumps over the lazy dog; it's what they'd said we'll do, isn't it?",
    "IT'S SHOUTED, camelCase, snake_case, kebab-case and MiXeD",
    "0 1 12 123 1234 12345 1,234.56 -7e-10 0x1F 3.14159 2024-01-31 v1.2.3",
    " one leading space, two  inside, three   more and one at the end ",
    "\n\nlines\n  indented\n\ttab\r\nreturn\n\n\n",
    "        eight spaces, then sixteen                ends",
    "na\u00efve caf\u00e9 \u00c5ngstr\u00f6m, decomposed: nai\u0308ve cafe\u0301",
    "\ufb01nd \uff21\uff22\uff23\uff11\uff12 \u2460 x\u00b2 \u00bd \u2126 \u212b",
    "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3002\ud55c\uad6d\uc5b4",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645, \u0928\u092e\u0938\u094d\u0924\u0947, "
    "\u05e9\u05dc\u05d5\u05dd, \u041f\u0440\u0438\u0432\u0435\u0442, \u0393\u03b5\u03b9\u03ac",
    "\U0001f600 \U0001f469\u200d\U0001f4bb \U0001f1eb\U0001f1f7 \u2764\ufe0f",
    "zero\u200bwidth no\u00a0break soft\u00adhyphen \u2018quotes\u2019 \u201cdouble\u201d \u2014 \u2026",
    "\u0130stanbul stra\u00dfe STRASSE \u01c5",
    "def f(x: int = 0) -> list[int]:\n    return [x**2 for _ in range(10)]  # squares\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * (c->d & 0xff); }",
    '{"key": ["value", 1.5, null], "url": "https://example.org/a?b=c&d=%20#e"}',
    "$\\sum_{i=1}^{n} x_i^2 \\leq \\infty$ != === <= >= && || :: ...",
    "<div class='a'>&amp; @user #tag 50% a/b\\c ~/.d *e* `f`</div>",
)
"""Texts that are encoded with both tokenizers where their files describe the way to the tokens differently."""

_NAMED = 4
"""Examples in a message."""


@dataclass(frozen=True)
class Vocabulary:
    """A model's rows and the tokenizer that gives them their meaning.

    Attributes:
        name: of the model in messages, such as "teacher".
        path: of its checkpoint.
        rows: of its embedding and its output layer, without the padding that tensor parallelism adds.
        tokenizer: directory of its tokenizer; None where it has none.
    """

    name: str
    path: Path
    rows: int
    tokenizer: Path | None

    @classmethod
    def of(cls, name: str, checkpoint: Checkpoint) -> Vocabulary:
        """That of an open checkpoint."""
        return cls(name, checkpoint.path, checkpoint.shape.vocab_size, checkpoint.tokenizer)


@dataclass(frozen=True)
class CommonVocabulary:
    """The token ids that two models have in common.

    Attributes:
        names: of both models.
        rows: of each.
        unlike: id -> what it is to both, for ids that mean something to one model alone, or something else to each.
        ends_differ: other tokens begin or end a text, or are put around it.
        remarks: all differences, for a warning; empty where there are none.
    """

    names: tuple[str, str]
    rows: tuple[int, int]
    unlike: Mapping[int, str] = field(default_factory=dict)
    ends_differ: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Rows that both have; ids from there on are of one model alone."""
        return min(self.rows)

    @property
    def left_out(self) -> tuple[int, ...]:
        """Ids that both have a row for and that do not mean the same to both, ascending."""
        return tuple(sorted(number for number in self.unlike if number < self.size))

    @property
    def whole(self) -> bool:
        """Whether every row of either model is common."""
        return self.rows[0] == self.rows[1] and not self.left_out

    @property
    def cuts_alike(self) -> bool:
        """Whether both tokenizers turn every document into the same ids."""
        return not self.unlike and not self.ends_differ

    @property
    def warning(self) -> str | None:
        """All differences in one sentence; None where there are none."""
        if not self.remarks:
            return None
        return f"{' and '.join(self.names)} have one tokenizer but for {'; '.join(self.remarks)}"


def compare(first: Vocabulary, second: Vocabulary) -> CommonVocabulary:
    """Compare the vocabularies of two models.

    A model without a tokenizer is taken at its word if its number of rows is the other's.

    Raises:
        CheckpointError: for tokenizers that turn ordinary text into other ids, with examples; for a different number of
            rows where one model has no tokenizer to say what they mean; for files that cannot be read as a tokenizer.
    """
    names, rows = (first.name, second.name), (first.rows, second.rows)
    if first.tokenizer is None or second.tokenizer is None:
        if rows[0] == rows[1]:
            return CommonVocabulary(names, rows)
        lacking = first if first.tokenizer is None else second
        raise CheckpointError(
            f"{first.name} {first.path} has a vocabulary of {rows[0]} and {second.name} {second.path} of {rows[1]}, "
            f"and the {lacking.name} carries no tokenizer that says which tokens they share; import it with its "
            "tokenizer, or use models with equally many rows"
        )
    ours = read_content(first.tokenizer, PROBES)
    if same_files(first.tokenizer, second.tokenizer):
        special = named_specials(second.tokenizer, ours.ids)
        templates = carried_templates(second.tokenizer)
        theirs = dataclasses.replace(ours, directory=second.tokenizer, special=special, templates=templates)
    else:
        theirs = read_content(second.tokenizer, PROBES)
    if faults := _faults(ours, theirs):
        raise CheckpointError(
            f"{first.name} ({origin(first.tokenizer)}) and {second.name} ({origin(second.tokenizer)}) have different "
            f"tokenizers: {'; '.join(faults)}. Their token ids do not mean the same, so neither their logits nor their "
            "losses can be compared; use models with one tokenizer"
        )
    unlike = {
        number: f"{ours.shown(number)} to {first.name}, {theirs.shown(number)} to {second.name}"
        for number in sorted(ours.ids.keys() | theirs.ids.keys())
        if ours.text(number) != theirs.text(number)
    }
    ends, fillers = _ends(ours, theirs)
    remarks = [] if rows[0] == rows[1] else [f"{rows[0]} and {rows[1]} rows"]
    for count, text in (
        (_only(unlike, ours, theirs), f"known to {first.name} alone"),
        (_only(unlike, theirs, ours), f"known to {second.name} alone"),
        ([number for number in unlike if number in ours.ids and number in theirs.ids], "of another text"),
    ):
        if count:
            examples = ", ".join(f"{number} is {unlike[number]}" for number in count[:_NAMED])
            more = ", ..." if len(count) > _NAMED else ""
            remarks.append(f"{len(count)} added token{'s' if len(count) > 1 else ''} {text} ({examples}{more})")
    if ours.templates != theirs.templates:
        remarks.append(_templates(names, ours, theirs))
    return CommonVocabulary(names, rows, unlike, bool(ends), tuple(remarks + ends + fillers))


def warnings_of(commons: Iterable[CommonVocabulary]) -> list[str]:
    """The warnings of comparisons with one model, those that say the same of several models as one."""
    groups: dict[tuple[str, tuple[str, ...]], list[CommonVocabulary]] = {}
    for common in commons:
        if common.remarks:
            first, second = common.names
            key = tuple(remark.replace(second, "\0") for remark in common.remarks)
            groups.setdefault((first, key), []).append(common)
    texts = []
    for alike in groups.values():
        others = [common.names[1] for common in alike]
        text = str(alike[0].warning)
        if len(others) > 1:
            text = text.replace(others[0], f"each of {', '.join(others)}")
        texts.append(text)
    return texts


def _templates(names: tuple[str, str], ours: TokenizerContent, theirs: TokenizerContent) -> str:
    """How the chat templates differ."""
    for name, side in zip(names, (ours, theirs), strict=True):
        if not side.templates:
            return f"chat templates (none of {name})"
    return "chat templates (of other texts)"


def _faults(ours: TokenizerContent, theirs: TokenizerContent) -> list[str]:
    """Differences in what ordinary text becomes."""
    # Of an id that one of them does not know, or that both have added, text without such tokens never learns.
    differing = [
        number
        for number in sorted(ours.ids.keys() | theirs.ids.keys())
        if ours.text(number) != theirs.text(number)
        and any(number in side.ids and number not in side.added for side in (ours, theirs))
    ]
    faults = []
    if differing:
        tables = [{text: number for number, text in side.ids.items()} for side in (ours, theirs)]
        tokens = list(dict.fromkeys(side.ids[n] for n in differing for side in (ours, theirs) if n in side.ids))
        tokens = [token for token in tokens if tables[0].get(token) != tables[1].get(token)]
        faults.append(_difference("tokens", "id", tokens, tables))
    if ours.merges is not None and theirs.merges is not None and ours.merges != theirs.merges:
        ranks = [{merge: rank for rank, merge in enumerate(side.merges or ())} for side in (ours, theirs)]
        merges = [merge for merge in {**ranks[0], **ranks[1]} if ranks[0].get(merge) != ranks[1].get(merge)]
        faults.append(_difference("merges", "order", merges, ranks))
    if not faults and ours.scores is not None and theirs.scores is not None:
        # Written by other programs, they may differ in their last digits.
        pairs = enumerate(zip(ours.scores, theirs.scores, strict=False))
        unlike = [number for number, (a, b) in pairs if abs(a - b) > 1e-4 * max(1.0, abs(a))]
        if unlike:
            number = unlike[0]
            values = f"{ours.scores[number]} and {theirs.scores[number]}"
            faults.append(f"{len(unlike)} scores of tokens differ ({ours.ids[number]!r} has {values})")
    return faults or _probed(ours, theirs)


def _difference(what: str, value: str, keys: Sequence[str], tables: Sequence[Mapping[str, int]]) -> str:
    """``2 tokens differ ('ab' has id 2 and id 3)``."""
    values = [f"{value} {table[keys[0]]}" if keys[0] in table else "none" for table in tables]
    return f"{len(keys)} {what} differ ({keys[0]!r} has {values[0]} and {values[1]})"


def _probed(ours: TokenizerContent, theirs: TokenizerContent) -> list[str]:
    """The first of the probes that becomes other ids; none are encoded where nothing can differ."""
    if ours.way == theirs.way:
        return []
    encoders = [_encoder(side) for side in (ours, theirs)]
    differing = [text for text in PROBES if encoders[0](text) != encoders[1](text)]
    if not differing:
        return []
    text = differing[0]
    shown = [f"{len(ids)} ids ({', '.join(map(str, ids[:6]))}, ...)" for ids in (encode(text) for encode in encoders)]
    return [f"{len(differing)} of {len(PROBES)} texts become other ids ({text!r}: {' and '.join(shown)})"]


def _encoder(side: TokenizerContent) -> Any:
    """Text -> ids, without the tokens that begin and end a text."""
    from tokenizers import Tokenizer

    path = side.directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(f"{path} cannot be read as a tokenizer ({error}); restore the file") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _only(unlike: Iterable[int], known: TokenizerContent, unknown: TokenizerContent) -> list[int]:
    return [number for number in unlike if number in known.ids and number not in unknown.ids]


def _ends(ours: TokenizerContent, theirs: TokenizerContent) -> tuple[list[str], list[str]]:
    """Remarks on other tokens that begin and end a text, and on other padding; a file may name none."""
    remarks: dict[bool, list[str]] = {False: [], True: []}
    for name in ours.special.keys() & theirs.special.keys():
        numbers = [side.special[name] for side in (ours, theirs)]
        if numbers[0] != numbers[1]:
            shown = [f"{n} {side.shown(n)}" for n, side in zip(numbers, (ours, theirs), strict=True)]
            remarks[name == "pad_token_id"].append(f"{name} is {' and '.join(shown)}")
    if ours.around != theirs.around:
        remarks[False].append(f"a text becomes {' '.join(ours.around)!r} and {' '.join(theirs.around)!r}")
    return sorted(remarks[False]), remarks[True]
