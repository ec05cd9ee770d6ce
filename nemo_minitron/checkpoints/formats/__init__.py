"""The table of checkpoint formats: an entry for each format that can be detected, read, written or verified.

The entries name functions of the formats' modules. None of them imports torch or NeMo before it is called.
"""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.checkpoints.formats.entry import ExportNotes, Format, Progress, WriteOptions
from nemo_minitron.checkpoints.formats.gguf import (
    convert_gguf,
    describe_gguf,
    export_gguf,
    exported_files,
    gguf_faults,
    gguf_logits,
    gguf_needs,
    is_gguf,
    open_gguf,
)
from nemo_minitron.checkpoints.formats.huggingface.checkpoint import describe_hf, is_hf, open_hf, peek_hf, write_hf
from nemo_minitron.checkpoints.formats.huggingface.config import hf_faults
from nemo_minitron.checkpoints.formats.huggingface.loader import hf_logits, hf_logits_streamed
from nemo_minitron.checkpoints.formats.nemo1.checkpoint import is_nemo1, open_nemo1, write_nemo1
from nemo_minitron.checkpoints.formats.nemo1.config import nemo1_faults
from nemo_minitron.checkpoints.formats.nemo1.loader import nemo1_distributed, nemo1_logits
from nemo_minitron.checkpoints.formats.nemo2.checkpoint import is_nemo2, open_nemo2, peek_nemo2, write_nemo2
from nemo_minitron.checkpoints.formats.nemo2.config import nemo2_faults, own_class_faults
from nemo_minitron.checkpoints.formats.nemo2.loader import nemo2_distributed, nemo2_logits
from nemo_minitron.config import tables
from nemo_minitron.config.parts import written_formats
from nemo_minitron.config.tables import Table

__all__ = ["FORMATS", "ExportNotes", "Format", "Progress", "WriteOptions", "detect", "written_formats"]

OWN_FORMATS = (
    Format(
        name="hf",
        title="Hugging Face",
        looks="config.json (Hugging Face)",
        detect=is_hf,
        open=open_hf,
        describe=describe_hf,
        write=write_hf,
        loader=hf_logits,
        streamed_loader=hf_logits_streamed,
        peek=peek_hf,
        safe_loader=True,
        faults=hf_faults,
        card="transformers",
    ),
    Format(
        name="nemo2",
        title="NeMo 2",
        looks="weights/ and context/ (NeMo 2)",
        detect=is_nemo2,
        open=open_nemo2,
        write=write_nemo2,
        loader=nemo2_logits,
        distributed=nemo2_distributed,
        faults=nemo2_faults,
        foreign_faults=own_class_faults,
        peek=peek_nemo2,
        write_needs=("nemo", "lightning"),
    ),
    Format(
        name="nemo",
        title=".nemo",
        looks="a .nemo file",
        detect=is_nemo1,
        open=open_nemo1,
        write=write_nemo1,
        loader=nemo1_logits,
        distributed=nemo1_distributed,
        faults=nemo1_faults,
        suffix=".nemo",
    ),
    Format(
        name="gguf",
        title="GGUF",
        looks="a .gguf file",
        detect=is_gguf,
        open=open_gguf,
        convert=convert_gguf,
        describe=describe_gguf,
        export=export_gguf,
        exported=exported_files,
        loader=gguf_logits,
        faults=gguf_faults,
        card="gguf",
        read_needs=("gguf",),
        write_needs=("gguf", "transformers"),
        settings_need=gguf_needs,
        suffix=".gguf",
    ),
)

FORMATS: Table[Format] = tables.FORMATS
"""By name. A path is of the first format that detects it. ``FORMATS.register(Format(...))`` adds one in this process,
and the entry points ``nemo_minitron.formats`` of an installed package do so in every process."""


def detect(path: Path) -> Format | None:
    """The format of a path, by file names alone; None if it is of no known format."""
    return next((entry for entry in FORMATS.values() if entry.detect(path)), None)
