"""The page of all settings: ``python -m nemo_minitron.config.reference > docs/settings.md``."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterable
from typing import Any

from nemo_minitron.config.describe import (
    CLUSTER,
    CONFIGURATIONS,
    Setting,
    direct_settings,
    settings_of,
    summary,
    yaml_value,
)

__all__ = ["page"]

_HEAD = """# Settings

<!-- Made by `python -m nemo_minitron.config.reference > docs/settings.md`; change the docstrings instead. -->

Every setting of every stage, of a pipeline, of a Slurm cluster and of `minitron plan`. `minitron <stage> --help` shows
those of one stage; `minitron config <stage>` prints a file with all of them at their defaults. A setting within a group
is reached with a dot, `runtime.seed=7`, and one within a list by its number, `data.sources[0].weight=2`. A star marks
what must be given, or what takes its place.
"""
_TITLES = {"pipeline": "minitron run", "slurm": "minitron run --slurm", "plan": "minitron plan"}


def page() -> str:
    """``docs/settings.md``."""
    configurations: dict[str, type[Any]] = {**CONFIGURATIONS, "plan": CLUSTER}
    parts: dict[type[Any], None] = {}
    for cls in configurations.values():
        for setting in settings_of(cls):
            if setting.part is not None:
                parts[setting.part] = None
    lines = [_HEAD, "## Stages", ""]
    for name, cls in configurations.items():
        if name == "pipeline":
            lines += ["## Pipelines and clusters", ""]
        prefix = "cluster." if name == "plan" else ""
        lines += [
            f"### {_TITLES.get(name, f'minitron {name}')}",
            "",
            *_section(cls, direct_settings(cls, None, prefix)),
        ]
    lines += ["## Groups of settings", ""]
    for part in sorted(parts, key=_title):
        lines += [f"### {_title(part)}", "", *_section(part, direct_settings(part))]
    return "\n".join(lines).rstrip("\n") + "\n"


def _section(cls: type[Any], settings: Iterable[Setting]) -> list[str]:
    rows = [_row(setting) for setting in settings]
    return [_markdown(summary(cls)), "", "| setting | type | default | meaning |", "|---|---|---|---|", *rows, ""]


def _row(setting: Setting) -> str:
    star = " *" if setting.needed else ""
    default = "required" if setting.must else f"`{setting.shown}`"
    kind = setting.type
    if setting.part is not None:
        title = _title(setting.part)
        link = f"[{title}](#{title.lower().replace(' ', '-')})"
        kind = f"list of {link}" if setting.listed else link
        default = default if setting.listed else _differing(setting)
    return f"| `{setting.name}`{star} | {kind} | {default} | {_markdown(setting.text).replace('|', chr(92) + '|')} |"


def _differing(setting: Setting) -> str:
    """The settings of a group whose defaults differ from those in the group's own section."""
    own = setting.part() if setting.part is not None else None
    values = ((field.name, getattr(setting.default, field.name)) for field in dataclasses.fields(own))  # type: ignore[arg-type]
    return ", ".join(f"`{name}: {yaml_value(value)}`" for name, value in values if value != getattr(own, name))


def _title(part: type[Any]) -> str:
    """``ChatDataConfig`` -> "Chat data settings"."""
    words = re.sub(r"(?<!^)([A-Z])", r" \1", part.__name__.removesuffix("Config"))
    return f"{words.capitalize()} settings"


def _markdown(text: str) -> str:
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    parts = text.replace("``", "`").split("`")
    # Outside of code, what Markdown or HTML would take for its own.
    parts[::2] = [re.sub(r"([<*_])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


if __name__ == "__main__":
    sys.stdout.write(page())
