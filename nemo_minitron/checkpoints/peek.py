"""What plans ask of a checkpoint that they do not open: its vocabulary."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.checkpoints.formats import detect
from nemo_minitron.checkpoints.tokenizer.comparison import Vocabulary
from nemo_minitron.config.hub import cached_model
from nemo_minitron.jobs.expected import expectation

__all__ = ["peek_vocabulary"]


def peek_vocabulary(name: str, path: str | Path) -> Vocabulary | None:
    """The vocabulary of a checkpoint, by its small files; tensors are not looked at.

    Args:
        name: of the model in messages.
        path: of the checkpoint, or the name of a model in the cache of the Hugging Face Hub.

    Returns:
        None where only opening the checkpoint tells, or there is none yet. Of a model that an earlier stage is going to
        write (:func:`~nemo_minitron.jobs.expected.expecting`), what is known of it beforehand.

    Raises:
        CheckpointError: for files that cannot be read.
    """
    is_expected, model = expectation(path)
    if is_expected:
        known = model is not None and model.tokenizer is not None
        return Vocabulary(name, Path(path), model.shape.vocab_size, model.tokenizer) if model and known else None
    given = Path(path).expanduser()
    place = given if given.exists() else cached_model(str(path))
    entry = None if place is None else detect(place)
    if place is None or entry is None or entry.peek is None:
        return None
    rows, tokenizer = entry.peek(place)
    return None if rows is None else Vocabulary(name, place, rows, tokenizer)
