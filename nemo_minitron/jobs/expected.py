"""Models that earlier stages of a pipeline are going to write, so that the plans of later stages know their sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.architecture import Architecture
from nemo_minitron.shape import ModelShape

__all__ = ["ExpectedModel", "expectation", "expecting"]


@dataclass(frozen=True)
class ExpectedModel:
    """A model that is not written yet.

    Attributes:
        shape: its sizes.
        architecture: its constants; ``dtype`` is that of the weights that will be written.
        tokenizer: directory of a tokenizer that is there and reads tokens as its own will; None where none is known.
    """

    shape: ModelShape
    architecture: Architecture
    tokenizer: Path | None = None


_models: ContextVar[Mapping[Path, ExpectedModel | None] | None] = ContextVar("expected models", default=None)


@contextmanager
def expecting(models: Mapping[str, ExpectedModel | None]) -> Iterator[None]:
    """Let plans that are made in the block take these models for written.

    Args:
        models: by path; None for a model whose sizes nobody knows yet, whatever is at its path now.
    """
    token = _models.set({Path(path).absolute(): model for path, model in models.items()})
    try:
        yield
    finally:
        _models.reset(token)


def expectation(path: str | Path) -> tuple[bool, ExpectedModel | None]:
    """Whether an earlier stage writes the model at a path, and the model; None where its sizes are not known."""
    models = _models.get()
    if not models:
        return False, None
    place = Path(path).absolute()
    return place in models, models.get(place)
