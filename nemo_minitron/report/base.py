"""The model that a model was made from: its name, and its license as its own card or its package gives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.config import STAGES
from nemo_minitron.config.hub import hub_name as name_on_hub
from nemo_minitron.data.packages import PACKAGES
from nemo_minitron.parsing import parse_yaml
from nemo_minitron.report.history import STAGES_BY_LINEAGE

__all__ = ["Base", "base_of", "steps_of"]

#: Names of files and directories that say what is in them, and not which model it is.
_GENERIC = ("hf", "model", "nemo", "nemo2", "checkpoint", "weights", "snapshots", "")
_SUFFIXES = (".gguf", ".nemo")


@dataclass(frozen=True)
class Base:
    """The first model of a lineage.

    Attributes:
        name: the last part of its name on the Hub, or of its path.
        hub_name: its name on the Hub, if it is known.
        license: as the Hub spells it, if it is known.
        license_name, license_link: name and address of a license that the Hub has no word for ("other").
    """

    name: str
    hub_name: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None

    @property
    def terms(self) -> str | None:
        """Further words on the license."""
        return ", ".join(text for text in (self.license_name, self.license_link) if text) or None


def base_of(lineage: Mapping[str, Any], path: str | Path, *, hub_name: str | None, license_name: str | None) -> Base:
    """The base of a checkpoint.

    Args:
        lineage, path: of the checkpoint.
        hub_name, license_name: win over what is read beside the base's weights, or is known of its package.
    """
    origin = steps_of(lineage, path)[-1][1]
    package = PACKAGES.get(origin)
    hub_name = hub_name or (package.hub_name if package else None) or name_on_hub(origin)
    card = {} if package else _front_matter(Path(origin))
    stated = package.license if package else card.get("license")
    other = {key: str(card[key]) for key in ("license_name", "license_link") if card.get(key) and not license_name}
    return Base(
        name=hub_name.rpartition("/")[2] if hub_name else _plain_name(origin),
        hub_name=hub_name,
        license=license_name or (stated.lower() if isinstance(stated, str) else None),
        **other,
    )


def steps_of(lineage: Mapping[str, Any], path: str | Path) -> list[tuple[str, str]]:
    """The steps of a lineage from the last to the first: what was done, and the path that it was done to."""
    steps: list[tuple[str, str]] = []
    place = str(path)
    for name, facts in reversed(list(lineage.items())):
        stage = STAGES_BY_LINEAGE.get(name, name)
        if stage in STAGES and isinstance(facts, Mapping) and name != "parents":
            place = str(facts.get("model") or facts.get("student") or place)
            steps.append((stage, place))
    step, parents = str(lineage.get("made_by", "given")), lineage.get("parents")
    for parent in parents.values() if isinstance(parents, Mapping) else ():
        before = steps_of(parent.get("lineage") or {}, str(parent.get("path")))
        return [*steps, (step, str(parent.get("path"))), *(before if before[0][0] != "given" else [])]
    source = str(lineage.get("source") or place)
    return [*steps, (step, source)] if step != "given" or not steps else [*steps[:-1], (steps[-1][0], source)]


def _plain_name(origin: str) -> str:
    """The name of a model by its path: of a directory that is called for its content, the one above's."""
    path = Path(origin)
    names = [path.name.removesuffix(path.suffix if path.suffix in _SUFFIXES else ""), *reversed(path.parts[:-1])]
    return next((name for name in names if name.lower() not in _GENERIC and name != path.anchor), path.name)


def _front_matter(origin: Path) -> dict[str, Any]:
    """The values at the head of a model card; none where there is no card, or none that can be read."""
    file = (origin.parent if origin.suffix in _SUFFIXES else origin) / "README.md"
    try:
        _, head, _ = file.read_text(encoding="utf-8").split("---\n", 2)
        values = parse_yaml(head)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}
