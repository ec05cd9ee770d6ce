"""How text is divided before byte-level BPE: the names of ``tokenizer.ggml.pre``, and what they are in tokenizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["SPLITS", "Split", "divide", "name_of"]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?" + _UPPER + "*" + _LOWER + r"+%s|[^\r\n\p{L}\p{N}]?" + _UPPER + "+" + _LOWER + "*%s"
_SLASHED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Split:
    """How text is divided before byte-level BPE.

    Attributes:
        digits: into single digits, then as GPT-2 does.
        pattern: by this pattern; None for GPT-2's.
        compose: characters are composed first (NFC), by transformers; llama.cpp composes none.
        whole_words: a word that is a token is not merged (``ignore_merges``).
        first: the first token is prepended where the header does not say.
    """

    digits: bool = False
    pattern: str | None = None
    compose: bool = False
    whole_words: bool = False
    first: bool = False

    @property
    def steps(self) -> tuple[tuple[str, str], ...]:
        """As :func:`_steps` gives them of a ``tokenizer.json``."""
        before = [("digits", "")] if self.digits else []
        if self.pattern is not None:
            before.append(("pattern", self.pattern))
        return (*before, ("bytes", "GPT-2's pattern" if self.pattern is None else ""))


_DIGITS = Split(digits=True)
_LLAMA3 = Split(pattern=_WORDS + r"\p{N}{1,3}" + _OTHERS, whole_words=True, first=True)
_QWEN2 = Split(pattern=_WORDS + r"\p{N}" + _OTHERS, compose=True)
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: By ``tokenizer.ggml.pre``, as llama.cpp reads it (``llama-vocab.cpp``). Of those that are alike the first is written.
SPLITS: dict[str, Split] = {
    "gpt-2": Split(),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    **dict.fromkeys(("smaug-bpe", "dbrx"), Split(pattern=_LLAMA3.pattern)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "qwen35": Split(pattern=_QWEN35, compose=True),
    "tekken": Split(pattern=_CASED % ("", "") + r"|\p{N}" + _SLASHED, whole_words=True),
    **dict.fromkeys(
        ("gpt-4o", "llama4"),
        Split(pattern=_CASED % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?") + r"|\p{N}{1,3}" + _SLASHED),
    ),
}


def divide(tokenizer: Tokenizer, split: Split, *, prefix: bool) -> None:
    """Set normalizer and pre-tokenizer; ``prefix`` puts a space before each text."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    if split.compose:
        tokenizer.normalizer = normalizers.NFC()
    before: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=split.pattern is None)]
    if split.digits:
        before.insert(0, pre_tokenizers.Digits(individual_digits=True))
    if split.pattern is not None:
        before.insert(0, pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(before) if len(before) > 1 else before[0]


def name_of(content: Mapping[str, Any]) -> str | None:
    """The name of ``tokenizer.ggml.pre`` for a ``tokenizer.json`` of byte-level BPE; None where llama.cpp has none.

    Whether characters are composed is passed over: llama.cpp has no names that differ in it.
    """
    steps, whole = _steps(content.get("pre_tokenizer")), bool(content["model"].get("ignore_merges"))
    return next(
        (name for name, split in SPLITS.items() if (split.steps, split.whole_words) == (steps, whole)),
        None,
    )


def _steps(before: Mapping[str, Any] | None) -> tuple[tuple[str, str], ...]:
    """A pre-tokenizer as kinds of steps with what sets them apart."""
    kind = (before or {}).get("type")
    if before is None:
        return ()
    if kind == "Sequence":
        return tuple(step for part in before["pretokenizers"] for step in _steps(part))
    if kind == "ByteLevel" and not before.get("add_prefix_space"):
        return (("bytes", "GPT-2's pattern" if before.get("use_regex", True) else ""),)
    if kind == "Digits" and before.get("individual_digits"):
        return (("digits", ""),)
    if kind == "Split":
        # every pattern of SPLITS covers every text, so that what lies between its matches is empty
        kept = (before.get("behavior"), bool(before.get("invert"))) in (("Isolated", False), ("Removed", True))
        pattern = before.get("pattern", {}).get("Regex")
        if kept and pattern == r"\p{N}":
            return (("digits", ""),)
        if kept and pattern is not None:
            return (("pattern", pattern),)
    return ((str(kind), str(dict(before))),)
