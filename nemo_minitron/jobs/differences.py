"""The settings and inputs in which two outputs of a stage differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

__all__ = ["differences"]


def differences(
    present: Mapping[str, Any], before: Mapping[str, Any] | None, defaults: Mapping[str, Any]
) -> dict[str, str]:
    """The differences of two identities (:func:`~nemo_minitron.jobs.records.identity_of`) of an output.

    Args:
        present: the identity now.
        before: the earlier identity; None if it is not known.
        defaults: the stage's default settings. A setting that did not exist before is taken to have had its default.

    Returns:
        A line for each setting and input that differs, by its name. Empty if ``before`` is None.
    """
    if before is None:
        return {}
    if before["hash"] == present["hash"]:
        then, now = before.get("contents", {}), present.get("contents", {})
        return {
            name: f"{name}: {present['parents'][name]['path']} was made again, and differs"
            for name in now
            if then.get(name, now[name]) != now[name]
        }
    if before["stage"] != present["stage"]:
        return {"stage": f"stage: {before['stage']} then, {present['stage']} now"}
    old, new = _flat(_filled(before["settings"], defaults)), _flat(present["settings"])
    changes = {
        key: f"{key}: {old.get(key)} then, {new.get(key)} now"
        for key in sorted({*old, *new})
        if not _same(old.get(key), new.get(key))
    }
    for name, parent in present["parents"].items():
        known = before["parents"].get(name)
        if known is None or known["hash"] != parent["hash"]:
            changes[name] = f"{name}: {parent['path']} has changed"
    return changes


def _same(then: object, now: object) -> bool:
    """Whether two settings are equal; a path may be absolute in one of them, as in a cluster's jobs."""
    if then == now:
        return True
    if not isinstance(then, str) or not isinstance(now, str):
        return False
    whole, part = sorted((PurePath(then), PurePath(now)), key=lambda path: not path.is_absolute())
    parts = part.parts
    return whole.is_absolute() and not part.is_absolute() and bool(parts) and whole.parts[-len(parts) :] == parts


def _filled(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with defaults for missing ones."""
    filled = {**defaults, **settings}
    for key, value in settings.items():
        if isinstance(value, dict) and isinstance(defaults.get(key), dict):
            filled[key] = _filled(value, defaults[key])
    return filled


def _flat(value: object, path: str = "") -> dict[str, object]:
    """Leaves of nested mappings and lists by dotted path."""
    if isinstance(value, dict | list) and value:
        leaves: dict[str, object] = {}
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            leaves |= _flat(entry, f"{path}.{key}" if path else str(key))
        return leaves
    return {path: value}
