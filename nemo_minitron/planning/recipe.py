"""Recipes: pipelines whose models are known before anything is downloaded.

A recipe is a module of ``nemo_minitron.recipes`` (``recipes/`` in the repository) with a function ``recipe(...)`` that
returns a :class:`Recipe`. Its stages are those of ``minitron run``.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemo_minitron.config.stages import StageConfig
from nemo_minitron.errors import ConfigError
from nemo_minitron.planning.model import Model

__all__ = ["Recipe", "load_recipe", "pipeline_content", "recipe_names"]

_PACKAGE = "nemo_minitron.recipes"


@dataclass(frozen=True)
class Recipe:
    """A pipeline, and the sizes of its models.

    Attributes:
        name: directory of its outputs below ``runs``.
        title: what it makes from which model, and where that is published.
        stages: in order.
        models: sizes of the models that the stages start from, by the path that a stage reads.
    """

    name: str
    title: str
    stages: list[StageConfig]
    models: dict[str, Model]

    @property
    def output(self) -> str:
        """Directory of the run."""
        return f"runs/{self.name}"

    def pipeline(self) -> dict[str, Any]:
        """The recipe as the content of a file for ``minitron run``; settings at their defaults are left out.

        Paths within the run are written as ``${output}/...``, so that another ``output`` moves them all.
        """
        return pipeline_content(self.name, self.output, self.stages)


def pipeline_content(name: str, output: str, stages: Sequence[StageConfig]) -> dict[str, Any]:
    """Stages as the content of a file for ``minitron run``; settings at their defaults are left out.

    Args:
        name: of the pipeline.
        output: directory of the run; paths within it are written as ``${output}/...``, so that another moves them all.
        stages: in order.
    """
    written = [{"stage": stage.STAGE, **_within(_settings(stage), output)} for stage in stages]
    return {"name": name, "output": output, "stages": written}


def recipe_names() -> list[str]:
    """Names of the shipped recipes, as ``minitron plan`` takes them."""
    package = importlib.import_module(_PACKAGE)
    modules = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name.replace("_", "-") for name in modules if name not in package.SHARED)


def load_recipe(name: str) -> Recipe:
    """A shipped recipe with its default settings.

    Raises:
        ConfigError: if there is none of that name.
    """
    names = recipe_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{name}: is no recipe{hint}; shipped recipes: {', '.join(names)}")
    made: Recipe = importlib.import_module(f"{_PACKAGE}.{name.replace('-', '_')}").recipe()
    return made


def _within(value: Any, output: str) -> Any:
    """A setting with ``${output}`` in place of the run's directory."""
    if isinstance(value, dict):
        return {key: _within(item, output) for key, item in value.items()}
    if isinstance(value, list):
        return [_within(item, output) for item in value]
    if isinstance(value, str) and (value == output or value.startswith(f"{output}/")):
        return "${output}" + value.removeprefix(output)
    return value


def _settings(config: Any) -> dict[str, Any]:
    """Fields of a configuration that differ from their defaults, nested ones likewise."""
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if value == default:
            continue
        if dataclasses.is_dataclass(value):
            settings[field.name] = _settings(value)
        elif isinstance(value, list):
            settings[field.name] = [_settings(item) if dataclasses.is_dataclass(item) else item for item in value]
        else:
            settings[field.name] = value
    return settings
