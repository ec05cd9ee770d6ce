"""``tokenizer_config.json`` as transformers 5 writes it, in the spelling that transformers 4 and 5 both read.

transformers 5 names other classes, has a list where transformers 4 has an object (``extra_special_tokens``), and leaves
out what it takes from ``tokenizer.json``. Both read ``tokenizer.json`` as it stands where the class is
``PreTrainedTokenizerFast`` and the settings below say what the file says.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.tokenizer.names import TEMPLATE, TEMPLATES
from nemo_minitron.errors import CheckpointError

__all__ = ["PLAIN_CLASS", "chat_templates", "needs_translation", "plain_spelling"]

PLAIN_CLASS = "PreTrainedTokenizerFast"
#: Classes that transformers 4 does not have.
NEWER_CLASSES = ("TokenizersBackend", "PythonBackend", "SentencePieceBackend", "MistralCommonBackend")
#: Keys of ``tokenizer_config.json`` that stand for what ``tokenizer.json`` and this module say, or that name code or
#: places on the machine of whoever saved it.
_REPLACED = (
    "auto_map",
    "backend",
    "is_local",
    "local_files_only",
    "merges_file",
    "name_or_path",
    "slow_tokenizer_class",
    "special_tokens_map_file",
    "tokenizer_file",
    "vocab_file",
)
#: transformers 4 prepends and appends what these say, whatever ``tokenizer.json`` says; transformers 5 ignores them.
_ENDS = ("add_bos_token", "add_eos_token")


def needs_translation(config: Mapping[str, Any], files: list[str]) -> bool:
    """Whether transformers 4 does not read these files as they were meant.

    Args:
        config: of ``tokenizer_config.json``.
        files: names of the tokenizer's files.
    """
    paths = [config.get(key) for key in ("tokenizer_file", "vocab_file", "merges_file")]
    return (
        is_newer(config)
        or isinstance(config.get("extra_special_tokens"), list)
        or "auto_map" in config
        or any(isinstance(path, str) and path not in files for path in paths)
        or any(name.startswith(f"{TEMPLATES}/") for name in files)
        # transformers 4 fails on these beside a configuration that lists no tokens
        or ("added_tokens.json" in files and "added_tokens_decoder" not in config)
    )


def is_newer(config: Mapping[str, Any]) -> bool:
    """Whether transformers 5 wrote this ``tokenizer_config.json``."""
    return "backend" in config or config.get("tokenizer_class") in NEWER_CLASSES


def plain_spelling(
    config: Mapping[str, Any], content: Mapping[str, Any], templates: Mapping[str, str]
) -> dict[str, Any]:
    """A ``tokenizer_config.json`` with which both generations take everything else from ``tokenizer.json``.

    Args:
        config: as it was saved.
        content: of ``tokenizer.json``.
        templates: chat templates by name, as :func:`chat_templates` gives them.

    Returns:
        The configuration, keys that are not known among it. Its only chat template is under ``chat_template``; several
        are a list there.
    """
    plain = {key: value for key, value in config.items() if key not in (*_REPLACED, *_ENDS)}
    plain["tokenizer_class"] = PLAIN_CLASS
    if isinstance(extra := plain.get("extra_special_tokens"), list):
        del plain["extra_special_tokens"]
        plain["additional_special_tokens"] = [*(plain.get("additional_special_tokens") or []), *extra]
    if is_newer(config):
        # It leaves byte-pair encodings alone, whatever it says.
        corrupts = plain.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
        if content.get("model", {}).get("type") == "BPE" and not corrupts:
            plain["clean_up_tokenization_spaces"] = False
    # transformers 4 changes the pre-tokenizer to what the configuration says, and that is false where it says nothing
    before = content.get("pre_tokenizer")
    plain["add_prefix_space"] = bool(before.get("add_prefix_space")) if isinstance(before, dict) else False
    plain["added_tokens_decoder"] = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in content.get("added_tokens") or []
    }
    plain.pop("chat_template", None)
    if templates:
        only = templates.get("default") if len(templates) == 1 else None
        listed = [{"name": name, "template": text} for name, text in templates.items()]
        plain["chat_template"] = listed if only is None else only
    return plain


def chat_templates(directory: Path, config: Mapping[str, Any], files: list[str]) -> dict[str, str]:
    """Chat templates by name, "default" first; a file comes before the configuration, as in transformers.

    Raises:
        CheckpointError: for templates that are no text.
    """
    named: dict[str, str] = {}
    try:
        if TEMPLATE in files:
            named["default"] = (directory / TEMPLATE).read_text(encoding="utf-8")
        for file in files:
            if file.startswith(f"{TEMPLATES}/"):
                name = file.removeprefix(f"{TEMPLATES}/").removesuffix(".jinja")
                named[name] = (directory / file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}: a chat template cannot be read ({error}); restore the file") from error
    given = config.get("chat_template")
    if named or given is None:
        return named
    if isinstance(given, str):
        return {"default": given}
    pairs = list(given.items()) if isinstance(given, dict) else None
    if isinstance(given, list) and all(isinstance(entry, dict) for entry in given):
        pairs = [(entry.get("name"), entry.get("template")) for entry in given]
    if pairs is None or not all(isinstance(name, str) and isinstance(text, str) for name, text in pairs):
        raise CheckpointError(
            f"{directory}/tokenizer_config.json: chat_template is neither a template nor a list of "
            '{"name": ..., "template": ...}; correct it'
        )
    return dict(pairs)
