"""Type, default and meaning of each setting, taken from the dataclasses themselves.

A field's type and default are the dataclass's; its meaning is its entry in the ``Attributes:`` section of the
docstring, with the names of the table that it chooses from (``TABLES`` of the class). ``minitron <stage> --help``,
``minitron config``, the completion of the shell and ``docs/settings.md`` are all made from these descriptions.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
import typing
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from nemo_minitron.config.hints import item_class, type_words
from nemo_minitron.config.load import load_part
from nemo_minitron.config.parts import ClusterConfig
from nemo_minitron.config.slurm import SlurmConfig
from nemo_minitron.config.stages import STAGES, PipelineConfig
from nemo_minitron.errors import ConfigError

__all__ = [
    "CLUSTER",
    "CONFIGURATIONS",
    "ConfigClass",
    "Setting",
    "direct_settings",
    "documented",
    "faults_of_defaults",
    "plain",
    "settings_of",
    "summary",
    "yaml_value",
]

#: What a file can hold: the settings of a stage, of a pipeline, or of a Slurm cluster.
CONFIGURATIONS: Mapping[str, type[Any]] = ChainMap({"pipeline": PipelineConfig, "slurm": SlurmConfig}, STAGES)  # type: ignore[arg-type]
#: The settings of ``minitron plan``, all below ``cluster``.
CLUSTER = ClusterConfig

#: A dataclass of :mod:`nemo_minitron.config`.
ConfigClass = type[Any]

_GROUPS = ("parallel", "runtime", "data")


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: with dots and brackets: ``data.sources[].path`` is a setting of each source.
        type: in words: "text or null".
        default: a plain value; that of a group of settings is an instance of ``part``.
        must: the setting has no default and must be given.
        needed: the fault of the defaults, if this setting, or another in its place, must be given.
        text: its meaning, from the docstring.
        part: dataclass of the group, or of the entries of the list, if the setting is one.
        listed: the setting is a list of ``part``.
    """

    name: str
    type: str
    default: Any
    must: bool
    needed: str | None
    text: str
    part: ConfigClass | None = None
    listed: bool = False

    @property
    def last(self) -> str:
        """The name without the names of the groups around it."""
        return self.name.rpartition(".")[2]

    @property
    def is_group(self) -> bool:
        """Whether it is a group of settings, without a value of its own."""
        return self.part is not None and not self.listed

    @property
    def shown(self) -> str:
        """The default as YAML; "required" without a default; empty for a group."""
        return "" if self.is_group else "required" if self.must else yaml_value(self.default)


def yaml_value(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, str) and ":" in value:
        return json.dumps(value, ensure_ascii=False)  # 12:00:00 without quotes would be a number
    text: str = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


@functools.cache
def documented(cls: type[Any]) -> dict[str, str]:
    """The entries of the ``Attributes:`` section of a class's own docstring; ``a, b: text`` is an entry of both."""
    _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    entries: list[str] = []
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break  # the next section
        if re.match(r" {4}\S", line):
            entries.append(line.strip())
        elif line.strip() and entries:
            entries[-1] += f" {line.strip()}"
    texts: dict[str, str] = {}
    for entry in entries:
        match = re.fullmatch(r"([a-z_]\w*(?:, [a-z_]\w*)*): (.*)", entry)
        if match:
            texts.update(dict.fromkeys(match[1].split(", "), match[2]))
    return texts


def summary(cls: type[Any]) -> str:
    """The first paragraph of a class's docstring."""
    return " ".join(inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].split())


def plain(text: str) -> str:
    """A docstring's text without its markup, for a terminal or a comment."""
    text = re.sub(r":\w+:`~?([^`]+)`", lambda match: match[1], text)
    return text.replace("``", "")


def faults_of_defaults(cls: type[Any]) -> dict[str, str]:
    """The faults of a configuration in which nothing is given, by setting."""
    try:
        load_part(cls, [])
    except ConfigError as error:
        named = (re.match(r"([a-z_][\w.]*): (.*)", fault, re.S) for fault in error.faults)
        return {match[1]: match[2] for match in named if match}
    return {}


def direct_settings(
    cls: type[Any], instance: Any = None, prefix: str = "", needed: dict[str, str] | None = None
) -> list[Setting]:
    """The settings of a dataclass, without the settings of its groups.

    Settings that must be given come first, then the others, then the groups.

    Args:
        cls: dataclass of :mod:`nemo_minitron.config`.
        instance: holds the defaults; None for the class's own.
        prefix: goes before each name.
        needed: of the whole configuration, by full name; None for the class's own.
    """
    instance = cls() if instance is None else instance
    needed = faults_of_defaults(cls) if needed is None else needed
    hints = typing.get_type_hints(cls)
    settings = []
    for field in dataclasses.fields(cls):
        hint, default, name = hints[field.name], getattr(instance, field.name), f"{prefix}{field.name}"
        item = item_class(hint)
        must = isinstance(default, str) and default == "???"
        settings.append(
            Setting(
                name=name,
                type=re.sub(r"\ba ", "", type_words(hint)),
                default=None if must else default,
                must=must,
                needed=needed.get(name),
                text=_meaning(cls, field.name),
                part=hint if dataclasses.is_dataclass(hint) else item,  # type: ignore[arg-type]
                listed=item is not None,
            )
        )
    return sorted(settings, key=_order)


def settings_of(
    cls: type[Any], instance: Any = None, prefix: str = "", needed: dict[str, str] | None = None
) -> Iterator[Setting]:
    """Every setting of a dataclass, each group followed by what is in it; arguments as :func:`direct_settings`."""
    needed = faults_of_defaults(cls) if needed is None else needed
    for setting in direct_settings(cls, instance, prefix, needed):
        yield setting
        if setting.part is None:
            continue
        if setting.listed:
            inner = {f"{setting.name}[].{name}": fault for name, fault in faults_of_defaults(setting.part).items()}
            yield from settings_of(setting.part, None, f"{setting.name}[].", inner)
        else:
            yield from settings_of(setting.part, setting.default, f"{setting.name}.", needed)


def _meaning(cls: type[Any], name: str) -> str:
    """The meaning from the docstring, and the names to choose from."""
    text = next((documented(base)[name] for base in cls.__mro__ if name in documented(base)), "")
    table = getattr(cls, "TABLES", {}).get(name)
    return text if table is None else f"{text}: {table.described()}."


def _order(setting: Setting) -> tuple[int, int]:
    if setting.part is None:
        return (0 if setting.must else 1), 0
    return 2, _GROUPS.index(setting.last) if setting.last in _GROUPS else len(_GROUPS)
