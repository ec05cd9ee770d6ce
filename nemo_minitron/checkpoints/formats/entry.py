"""The class of the entries of :data:`nemo_minitron.checkpoints.formats.FORMATS`, and the options of writing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.config.parts import SHARD_SIZE, parse_bytes
from nemo_minitron.shape import uniform_faults

if TYPE_CHECKING:
    import torch

    from nemo_minitron.architecture import Architecture
    from nemo_minitron.config import ExportConfig
    from nemo_minitron.shape import ModelShape

__all__ = ["Calibrate", "Compare", "ExportNotes", "Format", "Progress", "WriteOptions"]

Calibrate = Callable[[Any], None]
"""Runs a model over text."""

Compare = Callable[["Checkpoint", "Checkpoint"], Any]
"""Compares the logits of a model and of what was written: ``relative, same_choice``."""

Progress = Callable[[str, int, int], None]
"""Called as ``progress(tensor name, tensors done, tensors in all)``."""


@dataclass(frozen=True)
class WriteOptions:
    """How a checkpoint is to be written.

    Attributes:
        dtype: of the written tensors.
        scratch: a directory beside the output for the parts of a format that is one file; it does not exist yet, and is
            removed afterwards.
        vocab_multiple: a format with a padded vocabulary pads it to a multiple of this.
        progress: called after each tensor.
        max_shard_bytes: what a file of weights may hold, in formats that split them over files by size.
    """

    dtype: str
    scratch: Path
    vocab_multiple: int = 128
    progress: Progress | None = None
    max_shard_bytes: int = parse_bytes(SHARD_SIZE)


@dataclass(frozen=True)
class ExportNotes:
    """What an exported file may say of a model beside what it computes.

    Attributes:
        name: of the model.
        base_name, base_hub_name: of the model that it was made from, and that one's name on the Hub.
        license, license_name, license_link: as the Hub spells a license, and the name and address of one that it has no
            word for.
    """

    name: str
    base_name: str | None = None
    base_hub_name: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None


Export = Callable[
    ["Checkpoint", Path, "ExportConfig", ExportNotes, "Calibrate | None", "Compare | None"], dict[str, Any]
]
"""See :attr:`Format.export`."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A checkpoint format. All that the suite knows about a format is in its entry; no code compares format names.

    Attributes:
        name: its name in settings and in ``minitron.json``.
        title: its name in reports and messages.
        looks: what a user would see at a path of this format, for messages.
        detect: whether a path, which need not exist, is of this format. Cheap: names, no content.
        open: path -> checkpoint; reads metadata and no tensors. None for a format with ``convert``.
        write: writes a checkpoint to a path that is not there yet; the result there becomes the output.
            None where the format is only read.
        convert: of a format whose tensors cannot be read one at a time, ``convert(path, directory)``: writes a Hugging
            Face directory and opens it.
        describe: for proposals, sizes, constants and tokenizer by the small files or the header alone:
            ``describe(path, directory)``, where ``directory`` is an empty one for files of the tokenizer that have to
            be made. None where only opening, or converting, tells.
        loader: logits as this format's own library computes them: path, ``[rows, s]`` tokens, dtype that weights are
            rounded to -> ``[rows, s, vocabulary rows]``. It runs in a process of its own and may set up anything. None:
            ``verify`` reads the result back into a plain Megatron-core model.
        streamed_loader: the same with one layer's weights in memory at a time. None: see ``distributed``.
        distributed: of a format with weights in Megatron's distributed form, ``distributed(path, scratch)`` gives their
            directory, unpacked into ``scratch`` if need be, and what stands before the names of tensors:
            Megatron's own reader takes a layer at a time from there. None: this package reads it.
        safe_loader: the loader runs nothing that a file names. Other loaders get only files that this suite wrote.
        export: of a format that other programs read, and no stage:
            ``export(checkpoint, directory, config, notes, calibrate, compare)`` writes its files into a directory that
            is not there yet, checks them by ``verify`` of the configuration, and returns what the stage's record says
            of them. ``calibrate`` runs a model of transformers over the text of the configuration, and ``compare``
            compares the logits of two checkpoints by their loaders; each is None where it is not to be.
        exported: of such a format, names of its files below the directory -> bytes for each parameter.
        faults: why the format cannot hold a model, before any work; None: it holds all whose layers are alike.
        foreign_faults: why its own library, where this package is not installed, could not open what is written: an
            export is refused then, an output for further stages is not. None: it can open everything.
        card: a ``README.md`` with a model card belongs beside it: the library that it is for, by the Hub's name.
        suffix: the end of the name, with its dot, of a format that is one file; None: a directory.
        read_needs, write_needs: keys of :data:`nemo_minitron.runtime.requirements.PARTS`, packages without which
            a stage that imports, or exports, is refused before it starts.
        settings_need: further such packages that the settings of a stage ask for.
        peek: for plans, what small files of a checkpoint say without its tensors: ``(rows of the vocabulary, directory
            of the tokenizer)``, None for what they do not say. None where only opening tells.
    """

    name: str
    title: str
    looks: str
    detect: Callable[[Path], bool]
    open: Callable[[Path], Checkpoint] | None = None
    write: Callable[[Checkpoint, Path, WriteOptions], None] | None = None
    convert: Callable[[Path, Path], Checkpoint] | None = None
    describe: Callable[[Path, Path], Checkpoint] | None = None
    export: Export | None = None
    exported: Callable[[ExportConfig], dict[str, float]] | None = None
    loader: Callable[[Path, torch.Tensor, torch.dtype], torch.Tensor] | None = None
    streamed_loader: Callable[[Path, torch.Tensor, torch.dtype], torch.Tensor] | None = None
    distributed: Callable[[Path, Path], tuple[Path, str]] | None = None
    safe_loader: bool = False
    faults: Callable[[ModelShape, Architecture], list[str]] | None = None
    foreign_faults: Callable[[Architecture], list[str]] | None = None
    card: str | None = None
    suffix: str | None = None
    read_needs: tuple[str, ...] = ()
    write_needs: tuple[str, ...] = ()
    settings_need: Callable[[Any], tuple[str, ...]] | None = None
    peek: Callable[[Path], tuple[int | None, Path | None]] | None = None

    def refuses(self, shape: ModelShape, architecture: Architecture, *, export: bool = False) -> list[str]:
        """Why a model cannot be written in this format; empty if it can.

        Args:
            shape, architecture: the model's.
            export: it is to be opened without this package.
        """
        if self.faults is None:
            faults = uniform_faults(shape, f"format={self.name}")
        else:
            faults = self.faults(shape, architecture)
        return faults + (self.foreign_faults(architecture) if export and self.foreign_faults is not None else [])

    @property
    def note(self) -> str:
        """A few words for ``--help``."""
        return self.title

    @property
    def output_name(self) -> str:
        """What an export of this format is called below its output directory: ``nemo2``, ``model.nemo``, ``gguf``."""
        return self.name if self.suffix is None or self.export is not None else f"model{self.suffix}"
