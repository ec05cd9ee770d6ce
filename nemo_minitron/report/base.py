"""The model that a model was made from: its name, and its license as its own card or its package gives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.config.hub import hub_name as name_on_hub
from nemo_minitron.data.packages import PACKAGES
from nemo_minitron.parsing import parse_yaml

__all__ = ["Base", "base_of", "steps_of"]


@dataclass(frozen=True)
class Base:
    """The first model of a lineage.

    Attributes:
        name: the last part of its path, of its name on the Hub, or the name of its package.
        hub_name: its name on the Hub, if it is known.
        license: as the Hub spells it, if it is known.
        terms: further words on the license: the name and the address of one that the Hub has no word for.
    """

    name: str
    hub_name: str | None = None
    license: str | None = None
    terms: str | None = None


def base_of(lineage: Mapping[str, Any], path: str | Path, *, hub_name: str | None, license_name: str | None) -> Base:
    """The base of a checkpoint.

    Args:
        lineage, path: of the checkpoint.
        hub_name, license_name: win over what is read beside the base's weights.
    """
    origin = steps_of(lineage, path)[-1][1]
    hub_name = hub_name or name_on_hub(origin)
    package = PACKAGES.get(origin)
    card = {} if package else _front_matter(Path(origin) / "README.md")
    terms = ", ".join(str(card[key]) for key in ("license_name", "license_link") if card.get(key)) or None
    stated = card.get("license")
    if package is not None:
        stated = package.license
    return Base(
        name=hub_name.rpartition("/")[2] if hub_name else Path(origin).name,
        hub_name=hub_name,
        license=license_name or (stated.lower() if isinstance(stated, str) else None),
        terms=None if license_name else terms,
    )


def steps_of(lineage: Mapping[str, Any], path: str | Path) -> list[tuple[str, str]]:
    """The steps of a lineage from the last to the first: what was done, and the path that it was done to."""
    step = str(lineage.get("made_by", "given"))
    parents = lineage.get("parents")
    for parent in parents.values() if isinstance(parents, Mapping) else ():
        place = str(parent.get("path"))
        before = steps_of(parent.get("lineage") or {}, place)
        return [(step, place), *(before if before[0][0] != "given" else [])]
    return [(step, str(lineage.get("source") or path))]


def _front_matter(file: Path) -> dict[str, Any]:
    """The values at the head of a model card; none where there is no card, or none that can be read."""
    try:
        _, head, _ = file.read_text(encoding="utf-8").split("---\n", 2)
        values = parse_yaml(head)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}
