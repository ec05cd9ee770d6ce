"""Read YAML files and ``key=value`` overrides into the dataclasses, reporting every fault at once.

OmegaConf does the typing, the interpolation and the YAML; this module walks a file field by field, so that one fault
does not hide the next, and says where in the file each lies.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from nemo_minitron.config.hints import item_class, type_words
from nemo_minitron.config.paths import expanded
from nemo_minitron.config.spelling import instead_of, nearest
from nemo_minitron.config.stages import StageConfig
from nemo_minitron.errors import ConfigError, first_line
from nemo_minitron.parsing import compose_yaml

__all__ = ["Reader", "SettingsFile"]

_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+|\[\d+\])*")


def _dotted(path: tuple[str | int, ...]) -> str:
    """``("data", "sources", 0, "path")`` -> ``data.sources[0].path``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


class SettingsFile:
    """A YAML file with overrides applied: plain values, the line of each key, and the faults found so far."""

    def __init__(self, path: Path | None, overrides: Sequence[str], by_name: bool = False) -> None:
        self.path = path
        self.faults: list[str] = []
        #: Of faults in a pipeline's defaults, the stages in which they show.
        self.stages: dict[str, list[str]] = {}
        self.lines: dict[tuple[str | int, ...], int] = {}
        self.overridden: set[tuple[str | int, ...]] = set()
        raw = OmegaConf.create({}) if self.path is None else self._parse(self.path)
        #: Keys of the file itself.
        self.own = {str(key) for key in raw}
        for override in overrides:
            self._override(raw, override, by_name)
        self.values: dict[str, Any] = OmegaConf.to_container(raw)  # type: ignore[assignment]

    def _parse(self, path: Path) -> DictConfig:
        try:
            text = path.read_text(encoding="utf-8")
            tree = compose_yaml(text)
            if tree is not None and not isinstance(tree, yaml.MappingNode):
                raise ConfigError("the file must be a mapping of settings (`key: value` lines)", source=str(path))
            if tree is not None:
                self._note_lines(tree, ())
            config = OmegaConf.create(text) if tree is not None else OmegaConf.create({})
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot be read: {error}", source=str(path)) from error
        except yaml.MarkedYAMLError as error:
            line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
            raise ConfigError(f"{line}not valid YAML: {error.problem}", source=str(path)) from error
        except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
            raise ConfigError(f"not valid YAML: {first_line(error)}", source=str(path)) from error
        return config  # type: ignore[return-value]

    def _note_lines(self, node: yaml.Node, path: tuple[str | int, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.MarkedYAMLError(problem="a key must be a text", problem_mark=key.start_mark)
                self.lines[(*path, key.value)] = key.start_mark.line + 1
                self._note_lines(value, (*path, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                self.lines[(*path, index)] = value.start_mark.line + 1
                self._note_lines(value, (*path, index))

    def _override(self, raw: DictConfig, override: str, by_name: bool) -> None:
        key, equals, text = override.partition("=")
        if not equals or not _KEY.fullmatch(key):
            self.faults.append(f"override {override!r}: must have the form key=value, such as runtime.seed=7")
            return
        parts: list[str | int] = [
            int(p) if p.isdigit() else p for p in key.replace("[", ".").replace("]", "").split(".")
        ]
        if by_name and parts[0] == "stages" and len(parts) > 1 and isinstance(parts[1], str):
            names = _stage_names(raw)
            if parts[1] not in names:
                hint = nearest(parts[1], names)
                self.faults.append(
                    f"override {override!r}: no stage is called {parts[1]}{hint}; they are {', '.join(names)}"
                )
                return
            parts[1] = names.index(parts[1])
        try:
            value = OmegaConf.from_dotlist([f"value={text}"])["value"]
            OmegaConf.update(raw, ".".join(map(str, parts)), value, merge=False, force_add=True)
        except (
            OmegaConfBaseException,
            yaml.YAMLError,
            ValueError,
            TypeError,
            IndexError,
            AttributeError,
            RecursionError,
        ) as error:
            reason = first_line(error)
            self.faults.append(f"override {override!r}: cannot be applied ({reason})")
            return
        self.overridden.add(tuple(parts))

    def fault(self, path: tuple[str | int, ...], message: str, stage: str | None = None) -> None:
        """Add a fault, with the line of the key or of the nearest enclosing key.

        Args:
            path: of the setting.
            message: what is wrong.
            stage: of a fault in a pipeline's defaults, one of the stages in which it shows.
        """
        for length in range(len(path), 0, -1):
            if path[:length] in self.overridden:
                message = f"override: {message}"
                break
            if path[:length] in self.lines:
                message = f"line {self.lines[path[:length]]}: {message}"
                break
        if message not in self.faults:
            self.faults.append(message)
        if stage is not None:
            self.stages.setdefault(message, []).append(stage)

    def resolve(self, values: dict[str, Any]) -> dict[str, Any]:
        """``values`` with every interpolation replaced; one that cannot be replaced is a fault and left as it is."""
        root = OmegaConf.create(values)

        def walk(node: Any, raw: Any, path: tuple[str | int, ...]) -> Any:
            entries = raw.items() if isinstance(raw, dict) else enumerate(raw)
            out: dict[Any, Any] = {}
            for key, value in entries:
                here = (*path, key)
                if isinstance(value, (dict, list)):
                    out[key] = walk(node._get_node(key), value, here)
                    continue
                try:
                    resolved = value if value == "???" else node[key]
                    out[key] = (
                        OmegaConf.to_container(resolved, resolve=True) if OmegaConf.is_config(resolved) else resolved
                    )
                except OmegaConfBaseException as error:
                    self.fault(here, f"{_dotted(here)}={value}: cannot be resolved ({first_line(error)})")
                    out[key] = value
            return out if isinstance(raw, dict) else list(out.values())

        return walk(root, values, ())

    def raise_faults(self) -> None:
        """Raise a ConfigError with all faults, if there are any."""
        if self.faults:
            faults = [f"{fault}{_shown_in(self.stages.get(fault, []))}" for fault in self.faults]
            raise ConfigError(faults, source="command line" if self.path is None else str(self.path))


def _shown_in(stages: list[str]) -> str:
    """`` (stages a, b)``, at most three of them; empty without any."""
    if not stages:
        return ""
    more = f" and {len(stages) - 3} more" if len(stages) > 3 else ""
    return f" (stage{'s' if len(stages) > 1 else ''} {', '.join(stages[:3])}{more})"


def _stage_names(raw: DictConfig) -> list[str]:
    """Names of a pipeline's stages, as far as the file is well formed."""
    stages = OmegaConf.to_container(raw).get("stages")  # type: ignore[union-attr]
    entries = stages if isinstance(stages, list) else []
    return [str(e.get("name", e.get("stage"))) if isinstance(e, dict) else "" for e in entries]


class Reader:
    """Fills one dataclass from plain values."""

    def __init__(
        self, file: SettingsFile, stage: str | None = None, left_out: Collection[tuple[str, ...]] = ()
    ) -> None:
        """Start with nothing read.

        Args:
            file: where values and faults come from and go to.
            stage: name of the stage in a pipeline; None outside.
            left_out: the pipeline's defaults that do not hold in the stage, though it has their group.
        """
        self.file = file
        self.stage = stage
        self.left_out = left_out
        self.bad: set[tuple[str | int, ...]] = set()

    def read(self, cls: type[Any], values: dict[str, Any], where: tuple[str | int, ...]) -> Any:
        """An instance of ``cls``; faults are added to the file's, and faulty settings take their defaults."""
        self.where, self.root = where, cls
        node = OmegaConf.structured(cls)
        self._fill(node, cls, values, ())
        config = expanded(self._build(node, cls, ()), self._path_fault)
        self._faults(config, ())
        return config

    def _path_fault(self, setting: str, message: str) -> None:
        parts = re.findall(r"[^.\[\]]+|\[\d+\]", setting)
        self._fault(tuple(int(part[1:-1]) if part.startswith("[") else part for part in parts), message)

    def _fault(self, path: tuple[str | int, ...], message: str) -> None:
        """Add a fault: the name of the setting followed by ``message``."""
        self.bad.add(path)
        # In a pipeline the value may come from the defaults: then they hold more of the setting's path than the stage.
        note, below = self._not_default(path), self._held(self.where, path)
        if self.where and not note and self._held(("defaults",), path) > below:
            self.file.fault(("defaults", *path), f"defaults.{_dotted(path)}{message}", stage=self.stage)
        else:
            prefix = f"stage {self.stage}: " if self.stage else ""
            self.file.fault((*self.where, *path), f"{prefix}{_dotted(path)}{message}{note}")

    def _not_default(self, path: tuple[str | int, ...]) -> str:
        """The defaults beside a setting that is not given, if they are of another form."""
        group = path[:-1]
        names = sorted({place[len(group)] for place in self.left_out if place[: len(group)] == group != place})
        if not group or not names or len(path) in (self._held(self.where, path), self._held(("defaults",), path)):
            return ""
        return f"; defaults.{_dotted(group)} is of another form here ({', '.join(names)})"

    def _held(self, root: tuple[str | int, ...], path: tuple[str | int, ...]) -> int:
        """How many parts of ``path`` below ``root`` are written in the file or an override."""
        known = self.file.lines.keys() | self.file.overridden
        return max(n for n in range(len(path) + 1) if n == 0 or (*root, *path[:n]) in known)

    def _fill(self, node: DictConfig, cls: type[Any], values: dict[str, Any], path: tuple[str | int, ...]) -> None:
        hints = typing.get_type_hints(cls)
        fields = [field.name for field in dataclasses.fields(cls)]
        OmegaConf.set_readonly(node, False)  # that of a frozen dataclass is
        for key, value in values.items():
            here = (*path, key)
            if key not in fields:
                self._fault(here, f": is not a setting{instead_of(self.root, here)}")
                continue
            hint = hints[key]
            item = item_class(hint)
            if isinstance(value, str) and hasattr(hint, "TEXT"):
                value = {hint.TEXT: value}  # a plain text stands for one of the group's settings
            if dataclasses.is_dataclass(hint) and isinstance(value, dict):
                self._fill(node[key], hint, value, here)  # type: ignore[arg-type]
            elif item is not None and isinstance(value, list):
                node[key] = []
                for index, entry in enumerate(value):
                    if not isinstance(entry, dict):
                        self._fault((*here, index), f"={entry}: must be a mapping")
                        continue
                    node[key].append(OmegaConf.structured(item))
                    self._fill(node[key][-1], item, entry, (*here, index))
            else:
                try:
                    node[key] = value
                except (OmegaConfBaseException, ValueError, TypeError):
                    self._fault(here, f"={value}: must be {type_words(hint)}")

    def _build(self, node: DictConfig, cls: type[Any], path: tuple[str | int, ...]) -> Any:
        """The dataclass with the values of ``node``; a value that is missing or cannot be resolved is a fault."""
        hints = typing.get_type_hints(cls)
        kwargs: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            here = (*path, field.name)
            if OmegaConf.is_missing(node, field.name):
                if here not in self.bad:
                    self._fault(here, ": must be given")
                kwargs[field.name] = "???"
                continue
            try:
                value = node[field.name]
            except InterpolationToMissingValueError:  # the missing value itself is the fault
                kwargs[field.name] = "???"
                continue
            except OmegaConfBaseException as error:
                self._fault(here, f"={node._get_node(field.name)}: cannot be used ({first_line(error)})")
                continue
            hint, item = hints[field.name], item_class(hints[field.name])
            if dataclasses.is_dataclass(hint):
                kwargs[field.name] = self._build(value, hint, here)  # type: ignore[arg-type]
            elif item is not None:
                kwargs[field.name] = [self._build(entry, item, (*here, i)) for i, entry in enumerate(value)]
            elif OmegaConf.is_config(value):
                kwargs[field.name] = self._plain(value, here)
            else:
                kwargs[field.name] = value
        return cls(**kwargs)

    def _plain(self, value: Any, path: tuple[str | int, ...]) -> Any:
        try:
            return OmegaConf.to_container(value, resolve=True)
        except OmegaConfBaseException as error:
            self._fault(path, f": cannot be resolved ({first_line(error)})")
            return OmegaConf.to_container(value, resolve=False)

    def _faults(self, config: Any, path: tuple[str | int, ...]) -> None:
        """The faults that the dataclasses report, without those of settings that have a fault already.

        Groups come first: what a group says of a setting of its own goes before what the stage makes of its value.
        """
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            for index, entry in enumerate(value if isinstance(value, list) else []):
                if dataclasses.is_dataclass(entry):
                    self._faults(entry, (*path, field.name, index))
            if dataclasses.is_dataclass(value):
                self._faults(value, (*path, field.name))
        common = config.context_faults() if isinstance(config, StageConfig) else []
        before, found = set(self.bad), set()
        for message in [*config.faults(), *common]:
            names = _setting_named(config, message)
            here = (*path, *names)
            if names and here in before:
                continue
            if names:
                self._fault(here, message[len(".".join(names)) :])
                found.add(here)
            else:
                prefix = f"{_dotted(path)}." if path else ""
                self.file.fault((*self.where, *path), f"{prefix}{message}")
        self.bad = before | found


def _setting_named(config: Any, message: str) -> tuple[str, ...]:
    """The setting that a fault begins with, ``parallel.tensor=0: ...``, within a configuration; empty if with none."""
    match = re.match(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", message)
    names: list[str] = []
    for name in match.group().split(".") if match else ():
        if not dataclasses.is_dataclass(config) or not hasattr(config, name):
            break
        names.append(name)
        config = getattr(config, name)
    return tuple(names)
