"""Configurations of stages, pipelines and Slurm, by their path or the name of a shipped one, with overrides."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from nemo_minitron.config.defaults import share_out
from nemo_minitron.config.kinds import no_configuration, other_kind
from nemo_minitron.config.reading import Reader, SettingsFile
from nemo_minitron.config.slurm import SlurmConfig
from nemo_minitron.config.spelling import nearest
from nemo_minitron.config.stages import STAGES, DoctorConfig, PipelineConfig, StageConfig, find_stage
from nemo_minitron.errors import ConfigError

__all__ = [
    "find_config",
    "load",
    "load_doctor",
    "load_part",
    "load_slurm",
    "load_pipeline",
    "shipped_slurm",
    "shipped_configs",
]

Part = TypeVar("Part")

#: Endings of files that hold models or text.
_NO_YAML = frozenset((".nemo", ".gguf", ".safetensors", ".bin", ".pt", ".pth", ".jsonl", ".parquet", ".arrow", ".txt"))


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
    file = SettingsFile(Path(path), overrides)
    _refuse_other_kind(file, SlurmConfig, path)
    config: SlurmConfig = Reader(file).read(SlurmConfig, file.values, ())
    file.raise_faults()
    return config


def find_config(name: str | Path, wanted: type[Any] | None = None) -> Path:
    """The file of ``name``, which is a path or a shipped configuration ("demo", "demo.yaml", "configs/demo.yaml").

    Args:
        name: path or shipped name.
        wanted: class that is to be read from the file, for the remedy.

    Raises:
        ConfigError: if there is no such file, or it is no YAML by its name.
    """
    path = Path(name)
    shipped = shipped_configs()
    stem = path.name.removesuffix(".yaml")
    if path.is_file() and path.suffix not in _NO_YAML:
        return path
    if not path.exists() and stem in shipped and str(path.parent) in (".", "configs"):
        return Path(str(resources.files("nemo_minitron.configs"))) / f"{stem}.yaml"
    raise ConfigError(f"{name}: {no_configuration(str(name), wanted, shipped)}")


def load(stage: str, path: str | Path, overrides: Sequence[str] = ()) -> StageConfig:
    """The configuration of one stage.

    Args:
        stage: name of the stage, as :func:`~nemo_minitron.config.find_stage` takes it.
        path: YAML file or the name of a shipped one.
        overrides: ``key=value`` items that win over the file; values are YAML.

    Raises:
        ConfigError: with every fault of file and overrides.
    """
    cls = find_stage(stage)
    file = SettingsFile(find_config(path, cls), overrides)
    _refuse_other_kind(file, cls, path)
    config: StageConfig = Reader(file).read(cls, file.values, ())
    file.raise_faults()
    return config


def _refuse_other_kind(file: SettingsFile, wanted: type[Any], path: str | Path) -> None:
    """Refuse a file that is one of another kind as a whole, instead of naming each of its settings."""
    if (remedy := other_kind(file.own, wanted, str(path))) is not None:
        raise ConfigError(remedy, source=str(path))


def load_part(part: type[Part], overrides: Sequence[str]) -> Part:
    """One part of a configuration, such as a :class:`~nemo_minitron.config.parts.ClusterConfig`, from overrides alone.

    Args:
        part: dataclass of :mod:`nemo_minitron.config.parts`.
        overrides: ``key=value`` items; values are YAML.

    Raises:
        ConfigError: with every fault.
    """
    file = SettingsFile(None, overrides)
    part_config: Part = Reader(file).read(part, file.values, ())
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
    file = SettingsFile(find_config(path, PipelineConfig), overrides, by_name=True)
    _refuse_other_kind(file, PipelineConfig, path)
    schema = {field.name: field for field in dataclasses.fields(PipelineConfig)}
    values = {name: value for name, value in file.values.items() if name in schema}
    values.setdefault("vars", {})
    values = file.resolve(values)
    values.update({name: value for name, value in file.values.items() if name not in schema})
    pipeline = Reader(file).read(PipelineConfig, values, ())
    entries: list[tuple[int, type[StageConfig], dict[str, Any]]] = []
    for index, entry in enumerate(pipeline.stages):
        entry = dict(entry)
        kind = entry.pop("stage", None)
        if kind in STAGES:
            entries.append((index, STAGES[kind], entry))
            continue
        given = f"stages[{index}].stage={kind}: is no stage" if kind else f"stages[{index}]: names no stage"
        file.fault(("stages", index), f"{given}{nearest(str(kind), STAGES)}; stages: {', '.join(STAGES)}")

    classes = [cls for _, cls, _ in entries]
    # Where a stage is not known, a default may be meant for it.
    further = [] if len(entries) == len(pipeline.stages) else list(STAGES.values())
    shares, unused = share_out(pipeline.defaults, [*classes, *further])
    for place, message in unused.items() if entries or further else ():
        file.fault(("defaults", *place), f"defaults.{'.'.join(place)}{message}")

    stages: list[StageConfig] = []
    for (index, cls, entry), (defaults, left_out) in zip(entries, shares, strict=False):
        kind, fields = cls.STAGE, {field.name for field in dataclasses.fields(cls)}
        name = str(entry.setdefault("name", kind))
        if cls.__dataclass_fields__["output"].default == "???":
            entry.setdefault("output", f"{pipeline.output}/{name}")
        if "run" in fields:
            entry.setdefault("run", pipeline.output)
        merged = _merge(defaults, entry)
        stages.append(Reader(file, stage=name, left_out=left_out).read(cls, merged, ("stages", index)))
    _check_distinct(file, stages)
    file.raise_faults()
    return pipeline, stages


def _check_distinct(file: SettingsFile, stages: list[StageConfig]) -> None:
    """Two stages of one name, or with one output."""
    for what, values in (("name", [s.name for s in stages]), ("output", [s.output for s in stages])):
        for value in sorted({v for v in values if values.count(v) > 1}):
            file.fault((), f"stages: two have the {what} {value}; give each its own `{what}`")


def _merge(below: Any, above: Any) -> Any:
    """``below`` with the values of ``above`` in place of its own; mappings are merged key by key."""
    if isinstance(below, dict) and isinstance(above, dict):
        return {**below, **{key: _merge(below[key], value) if key in below else value for key, value in above.items()}}
    return above
