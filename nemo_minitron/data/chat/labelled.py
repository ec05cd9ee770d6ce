"""Conversations that a stage's configuration names: from a file, from a package, or from preference pairs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from nemo_minitron.config import AttributesConfig, ChatDataConfig
from nemo_minitron.data.chat.attributes import AttributeSchema, check_attributes, choose_schema, derive_attributes
from nemo_minitron.data.chat.conversations import Chat, read_chats, read_package_chats, split_held_out
from nemo_minitron.data.chat.preferences import PREFERENCE_PACKAGES, read_package_preferences, read_preferences
from nemo_minitron.errors import DataError

__all__ = ["Labelled", "labelled_chats", "open_chats", "schema_of"]


class Labelled(NamedTuple):
    """Conversations with attribute values.

    Attributes:
        train, held_out: the chats.
        preferred: of each held-out chat, whether it is the chosen answer of a pair (None for those of no pair); the
            two of a pair follow each other, the chosen one first.
    """

    train: list[Chat]
    held_out: list[Chat]
    preferred: list[bool | None]


def schema_of(config: AttributesConfig) -> AttributeSchema:
    """The schema that a configuration names."""
    return choose_schema(config.schema, config.names, config.highest)


def open_chats(
    path: str | None, package: str | None, cache_dir: str | Path, *, answered: bool = True, skip: bool = False
) -> list[Chat]:
    """Conversations of a file or of a package.

    Raises:
        DataError: as their readers.
    """
    if path is not None:
        return read_chats(path, answered=answered, skip=skip)
    assert package is not None  # the configuration has one of both
    return read_package_chats(package, cache_dir)


def labelled_chats(config: ChatDataConfig, attributes: AttributesConfig, *, pairs: bool) -> Labelled:
    """Conversations with attribute values, split by their prompts.

    Args:
        config: the file or package.
        attributes: schema of the values, and whether they are derived.
        pairs: a file holds preference pairs.

    Raises:
        DataError: for bad lines, values out of range, or conversations without values if none are derived.
    """
    schema = schema_of(attributes)
    parts = []
    for path, package in ((config.path, config.package), (config.validation, None)):
        if path is None and package is None:
            continue
        chats, preferred = _read(path, package, config.cache_dir, pairs=pairs, skip=config.skip)
        title = str(path or package)
        good = check_attributes(chats, schema, title, needed=not attributes.derive, skip=config.skip)
        parts.append([(chats[number], preferred[number]) for number in good])
    if attributes.derive:  # on one scale for both parts
        together = [labelled for part in parts for labelled in part]
        derived = derive_attributes([chat for chat, _ in together], schema, [chosen for _, chosen in together])
        relabelled = iter(derived)
        parts = [[(next(relabelled), chosen) for _, chosen in part] for part in parts]
    if not any(chat.attributes for part in parts for chat, _ in part):
        raise DataError(
            f"{config.path or config.package}: nothing gives values of {', '.join(schema.names)}; label the "
            "conversations, or take a schema with attributes that can be derived (verbosity, complexity)"
        )
    if config.validation is None:
        train, held = split_held_out(parts[0], config.held_out_fraction, config.seed, key=lambda item: item[0].prompt)
    else:
        train, held = parts
    return Labelled([chat for chat, _ in train], [chat for chat, _ in held], [chosen for _, chosen in held])


def _read(
    path: str | None, package: str | None, cache_dir: str | Path, *, pairs: bool, skip: bool
) -> tuple[list[Chat], list[bool | None]]:
    if not pairs and package not in PREFERENCE_PACKAGES:
        chats = open_chats(path, package, cache_dir, skip=skip)
        return chats, [None] * len(chats)
    if path is not None:
        preferences = read_preferences(path, skip=skip)
    else:
        preferences = read_package_preferences(str(package), cache_dir)
    return [chat for pair in preferences for chat in pair.chats()], [
        chosen for _ in preferences for chosen in (True, False)
    ]
