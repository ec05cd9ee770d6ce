"""What a proposal needs to know of a model: sizes, constants, tokenizer; by the readers that ``import`` uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from nemo_minitron.checkpoints import Checkpoint, open_checkpoint
from nemo_minitron.checkpoints.formats import detect
from nemo_minitron.config.hub import cached_model
from nemo_minitron.data.packages import PACKAGES, extract_member
from nemo_minitron.errors import CheckpointError
from nemo_minitron.planning import Model

__all__ = ["MODEL_PACKAGES", "Subject", "look_at"]

#: Packages that carry a model.
MODEL_PACKAGES = tuple(name for name, source in PACKAGES.items() if source.parts or source.members[0].endswith(".gguf"))


@dataclass(frozen=True)
class Subject:
    """A model that is looked at.

    Attributes:
        given: as it was given.
        package: it is the name of a package.
        model: sizes and constants.
        tokenizer: directory with the tokenizer's files, which is there while the model is looked at.
        format: of the checkpoint.
        notice: terms of the model that its user is to be shown.
    """

    given: str
    package: bool
    model: Model
    tokenizer: Path
    format: str
    notice: str = ""

    @property
    def name(self) -> str:
        """A short name, for titles."""
        return self.given if self.package else Path(self.given).name or self.given


@contextmanager
def look_at(given: str, cache_dir: str) -> Iterator[Subject]:
    """Open a model. Headers and small files are read, tensors are not; a package is fetched on first use.

    Args:
        given: a path of any format that ``minitron import`` reads, a model in the cache of the Hugging Face Hub, or the
            name of a package that carries one.
        cache_dir: where fetched packages are kept.

    Raises:
        MinitronError: for what is no model, is damaged, or has no tokenizer.
    """
    package = given in PACKAGES and not Path(given).exists()
    if package and given not in MODEL_PACKAGES:
        raise CheckpointError(
            f"{given}: is a package without a model; packages with models: {', '.join(MODEL_PACKAGES)}"
        )
    path = extract_member(given, cache_dir) if package else Path(given).expanduser()
    with TemporaryDirectory() as scratch:
        checkpoint = _opened(given if not path.exists() else str(path), Path(scratch))
        if checkpoint.tokenizer is None:
            raise CheckpointError(f"{given}: carries no tokenizer; put its files beside the weights")
        model = Model(checkpoint.shape, checkpoint.architecture)
        notice = PACKAGES[given].notice if package else ""
        yield Subject(given, package, model, checkpoint.tokenizer, checkpoint.format, notice)


def _opened(path: str, scratch: Path) -> Checkpoint:
    place = Path(path)
    if not place.exists():
        if (snapshot := cached_model(path)) is not None:
            return _opened(str(snapshot), scratch)
        try:
            return open_checkpoint(path)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; packages with models: {', '.join(MODEL_PACKAGES)}") from None
    entry = detect(place)
    if entry is not None and entry.describe is not None:
        return entry.describe(place, scratch)
    if entry is None or entry.convert is None:
        return open_checkpoint(path)
    raise CheckpointError(f"{path}: only importing a {entry.title} file tells its sizes; import it first")
