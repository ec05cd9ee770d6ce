"""The tokenizer in the header of a GGUF file, as ``tokenizer.json`` with a ``tokenizer_config.json``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.accounting import warn_once
from nemo_minitron.checkpoints.formats.gguf.header import GGUFContent
from nemo_minitron.checkpoints.formats.gguf.splits import SPLITS, divide
from nemo_minitron.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["MODELS", "write_tokenizer"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Used where the file carries no template of its own but its vocabulary has ChatML's markers."""

# llama.cpp's kinds of tokens
_CONTROL, _USER_DEFINED = 3, 4


def write_tokenizer(content: GGUFContent, directory: Path) -> None:
    """Write the tokenizer's files into a directory.

    Raises:
        CheckpointError: for a kind of tokenizer, or a splitting of text, that is not known; for a damaged vocabulary.
    """
    from transformers import PreTrainedTokenizerFast

    fields = content.fields
    kind, words = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.tokens")
    if kind not in MODELS:
        raise CheckpointError(
            f"{content.path}: tokenizer.ggml.model={kind!r} is not supported; supported: {', '.join(MODELS)}"
        )
    if not isinstance(words, list) or len(set(words)) != len(words):
        raise CheckpointError(f"{content.path}: tokenizer.ggml.tokens is missing, or has a token twice; fetch it again")
    special = {
        f"{name}_token": words[number]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if isinstance(number := fields.get(f"tokenizer.ggml.{key}_token_id"), int) and 0 <= number < len(words)
    }
    tokenizer = MODELS[kind](content, words, special)
    _add_tokens(content, tokenizer, words)
    # transformers sets a byte-level pre-tokenizer to what it is given here
    prefix = _starts_with_space(content)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, add_prefix_space=prefix, **special
    )
    named = _templates(content)
    if not named and {"<|im_start|>", "<|im_end|>"} <= set(words):
        named = {"default": CHATML}
    wrapped.chat_template = named.get("default") if len(named) < 2 else named
    wrapped.save_pretrained(directory)


def _byte_level(content: GGUFContent, words: list[str], special: dict[str, str]) -> Tokenizer:
    """Byte-level BPE, as GPT-2's."""
    from tokenizers import Tokenizer, decoders, models, processors

    fields = content.fields
    name, merges = fields.get("tokenizer.ggml.pre"), fields.get("tokenizer.ggml.merges") or []
    if name in (None, "default"):
        warn_once(content.path, "does not say how text is divided into words (tokenizer.ggml.pre); GPT-2's way is used")
        name = "gpt-2"
    if name not in SPLITS:
        raise CheckpointError(
            f"{content.path}: tokenizer.ggml.pre={name!r}: this way of dividing text is not known; known: "
            f"{', '.join(SPLITS)}; import the model's Hugging Face directory"
        )
    split = SPLITS[name]
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        tokenizer = Tokenizer(
            models.BPE(_ids(words), pairs, ignore_merges=split.whole_words)  # type: ignore[arg-type]
        )
    except Exception as error:  # tokenizers raises Exception itself
        raise CheckpointError(f"{content.path}: tokenizer.ggml.merges do not fit the tokens ({error})") from error
    divide(tokenizer, split, prefix=_starts_with_space(content))
    tokenizer.decoder = decoders.ByteLevel()
    ends = _ends(content, tokenizer, special, first=split.first)
    bytes_only = processors.ByteLevel(trim_offsets=ends is None)
    tokenizer.post_processor = bytes_only if ends is None else processors.Sequence([bytes_only, ends])
    return tokenizer


def _sentencepiece(content: GGUFContent, words: list[str], special: dict[str, str]) -> Tokenizer:
    """Sentencepiece's BPE with byte fallback, as Llama 2's."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import generate_merges

    fields = content.fields
    scores = fields.get("tokenizer.ggml.scores")
    fields.get("tokenizer.ggml.pre")  # says nothing of this kind
    if not isinstance(scores, list) or len(scores) != len(words):
        raise CheckpointError(f"{content.path}: tokenizer.ggml.scores are missing, or not one for each token")
    ids = _ids(words)
    merges = fields.get("tokenizer.ggml.merges")
    pairs = (
        [tuple(merge.split(" ")) for merge in merges]
        if merges
        else generate_merges(ids, dict(zip(words, scores, strict=True)))
    )
    tokenizer = Tokenizer(models.BPE(ids, pairs, unk_token=special.get("unk_token"), fuse_unk=True, byte_fallback=True))
    prefix = fields.get("tokenizer.ggml.add_space_prefix") is not False
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if prefix else steps)
    if (ends := _ends(content, tokenizer, special, first=True)) is not None:
        tokenizer.post_processor = ends
    return tokenizer


#: By ``tokenizer.ggml.model``: ``(content, tokens by id, special tokens) -> tokenizer``.
MODELS: dict[str, Callable[[GGUFContent, list[str], dict[str, str]], Any]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}


def _starts_with_space(content: GGUFContent) -> bool:
    """Whether byte-level BPE puts a space before each text."""
    return content.fields.get("tokenizer.ggml.add_space_prefix") is True


def _ids(words: list[str]) -> dict[str, int]:
    return {word: number for number, word in enumerate(words)}


def _ends(content: GGUFContent, tokenizer: Tokenizer, special: dict[str, str], *, first: bool) -> Any:
    """What is prepended and appended to each text; None for nothing.

    Args:
        content: the file.
        tokenizer: knows the tokens' ids.
        special: special tokens.
        first: whether the first token is prepended where the header does not say.
    """
    from tokenizers import processors

    wanted = {"bos": content.fields.get("tokenizer.ggml.add_bos_token"),
              "eos": content.fields.get("tokenizer.ggml.add_eos_token")}  # fmt: skip
    begins = special.get("bos_token") if (first if wanted["bos"] is None else wanted["bos"]) else None
    closes = special.get("eos_token") if wanted["eos"] else None
    if begins is None and closes is None:
        return None
    single = [*([begins] if begins else []), "$A", *([closes] if closes else [])]
    return processors.TemplateProcessing(
        single=single,
        pair=[*single, *(part.replace("$A", "$B") + ":1" for part in single)],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {begins, closes} - {None}],
    )


def _add_tokens(content: GGUFContent, tokenizer: Tokenizer, words: list[str]) -> None:
    """Mark the tokens that are looked for in a text as they stand."""
    from tokenizers import AddedToken

    kinds = content.fields.get("tokenizer.ggml.token_type") or [1] * len(words)
    if len(kinds) != len(words):
        raise CheckpointError(f"{content.path}: tokenizer.ggml.token_type has not one entry for each token")
    # all at once: each call builds the search for added tokens anew, and Gemma has 6,249
    for wanted, add in ((_CONTROL, tokenizer.add_special_tokens), (_USER_DEFINED, tokenizer.add_tokens)):
        special = wanted == _CONTROL
        marked = [word for word, kind in zip(words, kinds, strict=True) if kind == wanted]
        add([AddedToken(word, normalized=False, special=special) for word in marked])


def _templates(content: GGUFContent) -> dict[str, str]:
    """Chat templates by name."""
    names = content.fields.get("tokenizer.chat_templates") or []
    named = {"default": content.fields.get("tokenizer.chat_template")}
    named |= {name: content.fields.get(f"tokenizer.chat_template.{name}") for name in names}
    return {name: text for name, text in named.items() if isinstance(text, str)}
