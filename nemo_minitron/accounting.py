"""What a reader does with everything that it is given: use it, know it as harmless, refuse it by name, or warn of it.

A reader hands a configuration or a record on as :class:`Noted`, which notes the keys that are asked for. What nobody
asked for, and no list knows, :func:`unread` divides: something that is switched on may change what the model computes
or is trained on, so the reader refuses it; something that is switched off cannot.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

__all__ = ["Noted", "by_pattern", "off", "refusable", "unread", "warn_once"]

logger = logging.getLogger(__name__)

_warned: set[tuple[str, str]] = set()


class Noted(Mapping[str, Any]):
    """A configuration that notes which of its keys are read.

    Args:
        given: what the file says.
        defaults: what holds for keys that it leaves out.
    """

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
        self._given, self._defaults = given, defaults or {}
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return self._given[key] if key in self._given else self._defaults[key]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._defaults, **self._given})

    def __len__(self) -> int:
        return len({**self._defaults, **self._given})

    def left(self) -> dict[str, Any]:
        """What the file says and nobody asked for."""
        return {key: value for key, value in self._given.items() if key not in self._read}


def off(value: Any) -> bool:
    """Whether a value switches nothing on: null, false, zero, or empty."""
    return not value


def by_pattern(keys: Iterable[str], patterns: Mapping[str, str]) -> dict[str, str]:
    """Of these keys those that a shell pattern matches, each with the reason of the pattern."""
    return {key: why for key in keys for pattern, why in patterns.items() if fnmatch.fnmatchcase(key, pattern)}


def unread(
    left: Mapping[str, Any],
    *,
    harmless: Mapping[str, str],
    neutral: Mapping[str, Any] | None = None,
    idle: Callable[[Any], bool] = off,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of a configuration is neither used nor known to be harmless.

    Args:
        left: keys that nobody asked for.
        harmless: key -> why it changes nothing that is computed, whatever its value.
        neutral: key -> the value at which it changes nothing.
        idle: whether a value switches nothing on.

    Returns:
        ``(active, idle)``: what may change something, to be refused, and what is switched off.
    """
    neutral = neutral or {}
    unknown = {
        key: value
        for key, value in left.items()
        if key not in harmless and not (key in neutral and (idle(value) or value == neutral[key]))
    }
    resting = {key: value for key, value in unknown.items() if idle(value)}
    return {key: value for key, value in unknown.items() if key not in resting}, resting


def warn_once(where: Any, text: str) -> None:
    """Log a warning, once in a process: stages open the same checkpoint several times."""
    if (str(where), text) not in _warned:
        _warned.add((str(where), text))
        logger.warning("%s: %s", where, text)


def refusable(
    left: Mapping[str, Any],
    *,
    source: Any,
    what: str = "keys",
    harmless: Mapping[str, str],
    neutral: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What of a file is neither used nor known and may change something; of what is switched off, one warning.

    Args:
        left, harmless, neutral: as of :func:`unread`.
        source: the file, for the warning.
        what: what the file calls them: "keys", "settings".
    """
    active, resting = unread(left, harmless=harmless, neutral=neutral)
    if resting:
        named = ", ".join(f"{key}={value!r}" for key, value in resting.items())
        warn_once(source, f"{what} that are not known, and switched off, are left behind: {named}")
    return active
