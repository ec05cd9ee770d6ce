"""Read YAML files and ``key=value`` overrides into the dataclasses, reporting every fault at once.

OmegaConf does the typing, the interpolation and the YAML; this module walks a file field by field, so that one fault
does not hide the next, and says where in the file each lies.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from nemo_minitron.config.hints import item_class, type_words
from nemo_minitron.config.slurm import SlurmConfig
from nemo_minitron.config.stages import STAGES, DoctorConfig, PipelineConfig, StageConfig, find_stage
from nemo_minitron.errors import ConfigError

__all__ = [
    "find_config",
    "load",
    "load_doctor",
    "load_part",
    "load_slurm",
    "load_pipeline",
    "nearest",
    "shipped_slurm",
    "shipped_configs",
]

Part = TypeVar("Part")

_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+|\[\d+\])*")


def shipped_configs() -> list[str]:
    """Names of the configurations that come with the package."""
    folder = resources.files("nemo_minitron.configs")
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def shipped_slurm() -> list[str]:
    """Names of the Slurm settings that come with the package."""
    folder = resources.files("nemo_minitron.configs") / "slurm"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_slurm(path: str | Path, overrides: Sequence[str] = ()) -> SlurmConfig:
    """The settings of a Slurm cluster, from a YAML file or the name of a shipped one ("dgx").

    Raises:
        ConfigError: with every fault of the file.
    """
    shipped = shipped_slurm()
    stem, parent = Path(path).name.removesuffix(".yaml"), str(Path(path).parent)
    if not Path(path).exists() and stem in shipped and parent in (".", "slurm", "configs/slurm"):
        path = Path(str(resources.files("nemo_minitron.configs"))) / "slurm" / f"{stem}.yaml"
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file; shipped ones: {', '.join(shipped)}")
    file = _File(path, overrides)
    config: SlurmConfig = _Reader(file).read(SlurmConfig, file.values, ())
    file.raise_faults()
    return config


def find_config(name: str | Path) -> Path:
    """The file of ``name``, which is a path or a shipped configuration ("demo", "demo.yaml", "configs/demo.yaml").

    Raises:
        ConfigError: if there is no such file.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        raise ConfigError(f"{name}: is a directory; give a YAML file")
    shipped = shipped_configs()
    stem = path.name.removesuffix(".yaml")
    if stem in shipped and str(path.parent) in (".", "configs"):
        return Path(str(resources.files("nemo_minitron.configs"))) / f"{stem}.yaml"
    raise ConfigError(f"{name}: no such file{nearest(stem, shipped)}; shipped configurations: {', '.join(shipped)}")


def load(stage: str, path: str | Path, overrides: Sequence[str] = ()) -> StageConfig:
    """The configuration of one stage.

    Args:
        stage: name of the stage, as :func:`~nemo_minitron.config.find_stage` takes it.
        path: YAML file or the name of a shipped one.
        overrides: ``key=value`` items that win over the file; values are YAML.

    Raises:
        ConfigError: with every fault of file and overrides.
    """
    file = _File(path, overrides)
    reader = _Reader(file)
    config = reader.read(find_stage(stage), file.values, ())
    file.raise_faults()
    return config


def load_part(part: type[Part], overrides: Sequence[str]) -> Part:
    """One part of a configuration, such as a :class:`~nemo_minitron.config.parts.ClusterConfig`, from overrides alone.

    Args:
        part: dataclass of :mod:`nemo_minitron.config.parts`.
        overrides: ``key=value`` items; values are YAML.

    Raises:
        ConfigError: with every fault.
    """
    file = _File(None, overrides)
    part_config: Part = _Reader(file).read(part, file.values, ())
    file.raise_faults()
    return part_config


def load_doctor(words: Sequence[str]) -> DoctorConfig:
    """The configuration of ``minitron doctor --run``: overrides alone, or a file before them.

    Raises:
        ConfigError: with every fault.
    """
    config: StageConfig
    if words and "=" not in words[0]:
        config = load(DoctorConfig.STAGE, words[0], words[1:])
    else:
        config = load_part(DoctorConfig, words)
    assert isinstance(config, DoctorConfig)
    return config


def load_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> tuple[PipelineConfig, list[StageConfig]]:
    """A pipeline and its stages' configurations, interpolations resolved and defaults merged in.

    An override reaches a stage by its name or number: ``stages.distill.steps=20``.

    Raises:
        ConfigError: with every fault of file and overrides.
    """
    file = _File(path, overrides, by_name=True)
    schema = {field.name: field for field in dataclasses.fields(PipelineConfig)}
    values = {name: value for name, value in file.values.items() if name in schema}
    values.setdefault("vars", {})
    values = file.resolve(values)
    values.update({name: value for name, value in file.values.items() if name not in schema})
    pipeline = _Reader(file).read(PipelineConfig, values, ())
    known = {field.name for config in STAGES.values() for field in dataclasses.fields(config)}
    for key in pipeline.defaults:
        if key not in known:
            file.fault(("defaults", key), f"defaults.{key}: no stage has this setting{nearest(key, known)}")

    stages: list[StageConfig] = []
    for index, entry in enumerate(pipeline.stages):
        where = ("stages", index)
        entry = dict(entry)
        kind = entry.pop("stage", None)
        if kind not in STAGES:
            given = f"stages[{index}].stage={kind}: is no stage" if kind else f"stages[{index}]: names no stage"
            file.fault(where, f"{given}{nearest(str(kind), STAGES)}; stages: {', '.join(STAGES)}")
            continue
        cls = STAGES[kind]
        fields = {field.name for field in dataclasses.fields(cls)}
        name = str(entry.setdefault("name", kind))
        if cls.__dataclass_fields__["output"].default == "???":
            entry.setdefault("output", f"{pipeline.output}/{name}")
        if "run" in fields:
            entry.setdefault("run", pipeline.output)
        defaults = {key: value for key, value in pipeline.defaults.items() if key in fields}
        merged = _merge(defaults, entry)
        stages.append(_Reader(file, stage=name).read(cls, merged, where))
    _check_distinct(file, stages)
    file.raise_faults()
    return pipeline, stages


def _check_distinct(file: _File, stages: list[StageConfig]) -> None:
    """Two stages of one name, or with one output."""
    for what, values in (("name", [s.name for s in stages]), ("output", [s.output for s in stages])):
        for value in sorted({v for v in values if values.count(v) > 1}):
            file.fault((), f"stages: two have the {what} {value}; give each its own `{what}`")


def _merge(below: Any, above: Any) -> Any:
    """``below`` with the values of ``above`` in place of its own; mappings are merged key by key."""
    if isinstance(below, dict) and isinstance(above, dict):
        return {**below, **{key: _merge(below[key], value) if key in below else value for key, value in above.items()}}
    return above


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean x?`` if there is a similar name, else empty."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _dotted(path: tuple[str | int, ...]) -> str:
    """``("data", "sources", 0, "path")`` -> ``data.sources[0].path``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


class _File:
    """A YAML file with overrides applied: plain values, the line of each key, and the faults found so far."""

    def __init__(self, path: str | Path | None, overrides: Sequence[str], by_name: bool = False) -> None:
        self.path = None if path is None else find_config(path)
        self.faults: list[str] = []
        self.lines: dict[tuple[str | int, ...], int] = {}
        self.overridden: set[tuple[str | int, ...]] = set()
        raw = OmegaConf.create({}) if self.path is None else self._parse(self.path)
        for override in overrides:
            self._override(raw, override, by_name)
        self.values: dict[str, Any] = OmegaConf.to_container(raw)  # type: ignore[assignment]

    def _parse(self, path: Path) -> DictConfig:
        try:
            text = path.read_text(encoding="utf-8")
            tree = yaml.compose(text, Loader=yaml.SafeLoader)
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
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"not valid YAML: {reason}", source=str(path)) from error
        return config  # type: ignore[return-value]

    def _note_lines(self, node: yaml.Node, path: tuple[str | int, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
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
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, IndexError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            self.faults.append(f"override {override!r}: cannot be applied ({reason})")
            return
        self.overridden.add(tuple(parts))

    def fault(self, path: tuple[str | int, ...], message: str) -> None:
        """Add a fault, with the line of the key or of the nearest enclosing key."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.overridden:
                message = f"override: {message}"
                break
            if path[:length] in self.lines:
                message = f"line {self.lines[path[:length]]}: {message}"
                break
        if message not in self.faults:  # a fault in a pipeline's defaults shows in every stage
            self.faults.append(message)

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
                    self.fault(here, f"{_dotted(here)}={value}: cannot be resolved ({str(error).splitlines()[0]})")
                    out[key] = value
            return out if isinstance(raw, dict) else list(out.values())

        return walk(root, values, ())

    def raise_faults(self) -> None:
        """Raise a ConfigError with all faults, if there are any."""
        if self.faults:
            raise ConfigError(self.faults, source="command line" if self.path is None else str(self.path))


def _stage_names(raw: DictConfig) -> list[str]:
    """Names of a pipeline's stages, as far as the file is well formed."""
    stages = OmegaConf.to_container(raw).get("stages")  # type: ignore[union-attr]
    entries = stages if isinstance(stages, list) else []
    return [str(e.get("name", e.get("stage"))) if isinstance(e, dict) else "" for e in entries]


class _Reader:
    """Fills one dataclass from plain values."""

    def __init__(self, file: _File, stage: str | None = None) -> None:
        self.file = file
        self.stage = stage
        self.bad: set[tuple[str | int, ...]] = set()

    def read(self, cls: type[Any], values: dict[str, Any], where: tuple[str | int, ...]) -> Any:
        """An instance of ``cls``; faults are added to the file's, and faulty settings take their defaults."""
        self.where = where
        node = OmegaConf.structured(cls)
        self._fill(node, cls, values, ())
        config = self._build(node, cls, ())
        self._faults(config, ())
        return config

    def _fault(self, path: tuple[str | int, ...], message: str) -> None:
        """Add a fault: the name of the setting followed by ``message``."""
        self.bad.add(path)
        # In a pipeline the value may come from the defaults: then they hold more of the setting's path than the stage.
        if self.where and self._held(("defaults",), path) > self._held(self.where, path):
            self.file.fault(("defaults", *path), f"defaults.{_dotted(path)}{message}")
        else:
            prefix = f"stage {self.stage}: " if self.stage else ""
            self.file.fault((*self.where, *path), f"{prefix}{_dotted(path)}{message}")

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
                self._fault(
                    here, f": is not a setting{nearest(str(key), fields) or '; settings: ' + ', '.join(fields)}"
                )
                continue
            hint = hints[key]
            item = item_class(hint)
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
                self._fault(here, f"={node._get_node(field.name)}: cannot be used ({str(error).splitlines()[0]})")
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
            self._fault(path, f": cannot be resolved ({str(error).splitlines()[0]})")
            return OmegaConf.to_container(value, resolve=False)

    def _faults(self, config: Any, path: tuple[str | int, ...]) -> None:
        """The faults that the dataclasses report, without those of settings that have a fault already."""
        common = config.context_faults() if isinstance(config, StageConfig) else []
        for message in [*config.faults(), *common]:
            match = re.match(r"[A-Za-z_]\w*", message)
            name = match.group() if match else ""
            if (*path, name) in self.bad:
                continue
            before = set(self.bad)
            prefix = f"{_dotted(path)}." if path else ""
            if hasattr(config, name):
                self._fault((*path, name), message[len(name) :])
            else:
                self.file.fault((*self.where, *path), f"{prefix}{message}")
            self.bad = before
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            for index, entry in enumerate(value if isinstance(value, list) else []):
                if dataclasses.is_dataclass(entry):
                    self._faults(entry, (*path, field.name, index))
            if dataclasses.is_dataclass(value):
                self._faults(value, (*path, field.name))
