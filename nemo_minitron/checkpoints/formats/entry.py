"""What a checkpoint format is to the suite: an entry of :data:`nemo_minitron.checkpoints.formats.FORMATS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.checkpoints.base import Checkpoint

if TYPE_CHECKING:
    import torch

__all__ = ["Format", "Progress", "WriteOptions"]

Progress = Callable[[str, int, int], None]
"""Called as ``progress(tensor name, tensors done, tensors in all)``."""


@dataclass(frozen=True)
class WriteOptions:
    """How a checkpoint is to be written.

    Attributes:
        dtype: of the tensors.
        scratch: a directory beside the output, not there yet and cleared away afterwards, for the parts of a format
            that is one file.
        vocab_multiple: what a format that pads the vocabulary pads it to.
        progress: called after each tensor.
    """

    dtype: str
    scratch: Path
    vocab_multiple: int = 128
    progress: Progress | None = None


@dataclass(frozen=True, kw_only=True)
class Format:
    """A checkpoint format. Nothing else in the suite asks for a format's name to know one of these things.

    Attributes:
        name: as settings and ``minitron.json`` spell it.
        title: as reports and messages call it.
        looks: what a user would see at a path of this format, for messages.
        detect: whether a path, which need not exist, is of this format. Cheap: names, no content.
        open: path -> checkpoint, metadata read, tensors not. None where ``convert`` stands for it.
        write: writes a checkpoint to a path that is not there yet; what stands at it in the end becomes the output.
            None where the format is only read.
        convert: of a format whose tensors cannot be read one at a time, ``convert(path, directory)``: writes a Hugging
            Face directory and opens it.
        loader: logits as this format's own library computes them: path, ``[rows, s]`` tokens, dtype that weights are
            rounded to -> ``[rows, s, vocabulary rows]``. It runs in a process of its own and may set up anything. None:
            ``verify`` reads the result back into a plain Megatron-core model.
        safe_loader: the loader runs nothing that a file names. Another one only sees what the suite itself wrote.
        suffix: the end of the name, with its dot, of a format that is one file; None: a directory.
        read_needs, write_needs: keys of :data:`nemo_minitron.runtime.requirements.PARTS`, packages without which
            a stage that imports, or exports, is refused before it starts.
    """

    name: str
    title: str
    looks: str
    detect: Callable[[Path], bool]
    open: Callable[[Path], Checkpoint] | None = None
    write: Callable[[Checkpoint, Path, WriteOptions], None] | None = None
    convert: Callable[[Path, Path], Checkpoint] | None = None
    loader: Callable[[Path, torch.Tensor, torch.dtype], torch.Tensor] | None = None
    safe_loader: bool = False
    suffix: str | None = None
    read_needs: tuple[str, ...] = ()
    write_needs: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """For ``--help``."""
        return self.title

    @property
    def output_name(self) -> str:
        """What an export of this format is called below its output directory: ``nemo2``, ``model.nemo``."""
        return self.name if self.suffix is None else f"model{self.suffix}"
