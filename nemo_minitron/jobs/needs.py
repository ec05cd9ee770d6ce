"""Check, before anything starts, that the packages that stages need are installed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_minitron.config import BenchmarkConfig, StageConfig
from nemo_minitron.config.tables import FORMATS
from nemo_minitron.errors import MissingDependency
from nemo_minitron.runtime.requirements import faults

__all__ = ["check_needs", "needs_of"]

#: Ends of names of data that only pyarrow reads.
_PYARROW = (".parquet", ".pq", ".arrow", ".feather", ".ipc", ".zst")


def needs_of(config: StageConfig) -> tuple[str, ...]:
    """Keys of :data:`~nemo_minitron.runtime.requirements.PARTS` that a stage needs with these settings."""
    modules = list(config.NEEDS)
    for form in getattr(config, "formats", ()):
        modules += FORMATS[form].write_needs
        if (more := FORMATS[form].settings_need) is not None:
            modules += more(config)
    if getattr(config, "quantize", None) and config.STAGE == "export":
        modules += ["modelopt", "transformers"]
    if getattr(getattr(config, "harness", None), "tasks", None):
        modules.append("lm_eval")
    if isinstance(config, BenchmarkConfig) and not config.skip_missing:
        modules += ["llama_cpp" for _, engine in config.runs() if engine == "llama.cpp"]
    if (source := getattr(config, "source", None)) is not None:
        modules += [need for entry in FORMATS.values() if entry.detect(Path(source)) for need in entry.read_needs]
    paths = [Path(path) for path in _data_paths(config)]
    if any(path.suffix.lower() in _PYARROW for path in paths):
        modules.append("pyarrow")
    if any(source.dataset is not None for source in _sources(config)) or any(path.is_dir() for path in paths):
        modules.append("datasets")
    return tuple(dict.fromkeys(modules))


def check_needs(stages: Iterable[StageConfig]) -> None:
    """Refuse stages whose packages are missing or of a version that does not work.

    Raises:
        MissingDependency: with a line for each such package.
    """
    needs: dict[str, dict[str, None]] = {}
    for config in stages:
        modules = needs_of(config)
        subject = "alignment" if "nemo_aligner" in modules else config.STAGE
        needs.setdefault(subject, {}).update(dict.fromkeys(modules))
    if lacking := faults(needs):
        raise MissingDependency("\n".join(lacking))


def _data_paths(config: StageConfig) -> list[str]:
    """The files of texts, conversations, pairs, prompts and tasks."""
    groups = [getattr(config, name, None) for name in ("data", "prompts", "task")]
    named = [getattr(group, name, None) for group in groups for name in ("path", "validation")]
    named += [getattr(source, name) for source in _sources(config) for name in ("path", "chat")]
    return [path for path in named if path is not None]


def _sources(config: StageConfig) -> list[Any]:
    return list(getattr(getattr(config, "data", None), "sources", None) or [])
