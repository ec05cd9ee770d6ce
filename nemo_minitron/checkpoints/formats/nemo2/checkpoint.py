"""Reader and writer of NeMo 2 checkpoints.

Such a checkpoint is a directory with ``weights/`` (a distributed checkpoint) and ``context/``, from which NeMo builds
the model again.

Reading takes ``context/model.yaml`` as data: ``context/io.json`` can name any Python symbol, and NeMo calls what it
names, so it is never opened here. Writing leaves the context to NeMo's own ``io_dump``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.formats.entry import WriteOptions
from nemo_minitron.checkpoints.formats.nemo2.config import config_class, from_nemo2, model_class, nemo_config
from nemo_minitron.checkpoints.formats.nemo_common import COMMON, padded, parse_yaml
from nemo_minitron.checkpoints.model_record import read_model_record, write_model_record
from nemo_minitron.checkpoints.tokenizer.files import check_tokenizer, copy_tokenizer, find_tokenizer
from nemo_minitron.errors import CheckpointError, MissingDependency, first_line
from nemo_minitron.runtime.requirements import require
from nemo_minitron.shape import require_uniform

__all__ = ["is_nemo2", "open_nemo2", "peek_nemo2", "write_nemo2"]


def is_nemo2(path: Path) -> bool:
    """Whether a path is a NeMo 2 directory, complete or not."""
    return (path / "context").is_dir() or (path / "weights").is_dir()


def open_nemo2(path: Path) -> Checkpoint:
    """Open a NeMo 2 checkpoint directory that this suite or NeMo wrote. Tensors are read later, one at a time.

    The true vocabulary size is ``minitron.json``'s; without one it is the configuration's ``vocab_size``, else the
    tokenizer's, else the stored rows.

    Raises:
        CheckpointError: a missing or damaged part, a foreign architecture, sizes that do not fit the tensors, a
            tokenizer that does not fit.
    """
    from nemo_minitron.checkpoints.formats.torch_dist.reader import TorchDist, checkpoint_of

    for part in ("weights", "context"):
        if not (path / part).is_dir():
            raise CheckpointError(f"{path / part} is missing; a NeMo 2 checkpoint has weights/ and context/")
    source = path / "context" / "model.yaml"
    try:
        content = parse_yaml(source.read_bytes(), source)
    except FileNotFoundError:
        raise CheckpointError(f"{source} is missing; the checkpoint's context is incomplete") from None
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read ({first_line(error)}); restore the file") from error
    tokenizer = _find_tokenizer(path / "context", content)
    store = TorchDist(path / "weights")
    return checkpoint_of(
        store,
        read_model_record(path),
        lambda rows: from_nemo2(content, source, rows, tokenizer),
        tokenizer=tokenizer,
        path=path,
        form="nemo2",
    )


def peek_nemo2(path: Path) -> tuple[int | None, Path | None]:
    """Rows of the vocabulary, if ``minitron.json`` says them, and the directory of the tokenizer.

    Raises:
        CheckpointError: for a context that cannot be read.
    """
    source, record = path / "context" / "model.yaml", read_model_record(path)
    content = parse_yaml(source.read_bytes(), source) if source.is_file() else {}
    return None if record is None else record.shape.vocab_size, _find_tokenizer(path / "context", content)


def write_nemo2(checkpoint: Checkpoint, directory: Path, options: WriteOptions) -> None:
    """Write a NeMo 2 directory into ``directory`` (which this creates; callers write aside).

    Raises:
        CheckpointError: if the tokenizer does not fit the vocabulary, or there is no configuration for the model.
        ShapeError: if layers differ in size.
        MissingDependency: where NeMo cannot be imported.
    """
    from nemo_minitron.checkpoints.formats.torch_dist.writer import write_torch_dist

    require_uniform(checkpoint.shape, "the nemo2 format")
    if checkpoint.tokenizer is not None:
        check_tokenizer(checkpoint.tokenizer, checkpoint.shape.vocab_size)
    require("nemo", for_="writing a NeMo 2 checkpoint")
    config_class(checkpoint.architecture)
    directory.mkdir(parents=True)
    dtype, vocab_multiple = options.dtype, options.vocab_multiple
    rows = padded(checkpoint.shape.vocab_size, vocab_multiple)
    content = write_torch_dist(
        checkpoint,
        directory / "weights",
        prefix="module.",
        dtype=dtype,
        vocab_rows=rows,
        common=COMMON,
        progress=options.progress,
    )
    _write_context(checkpoint, directory / "context", dtype=dtype, rows=rows, multiple=vocab_multiple)
    write_model_record(checkpoint, directory, dtype=dtype, form="nemo2", weights=content)


def _write_context(checkpoint: Checkpoint, directory: Path, *, dtype: str, rows: int, multiple: int) -> None:
    """``context/`` through NeMo's ``io_dump``: io.json, model.yaml and a copy of the tokenizer."""
    require("nemo", for_="writing a NeMo 2 checkpoint")
    try:
        from nemo import lightning as nl
        from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
        from nemo.lightning.io.pl import TrainerContext
    except ImportError as error:
        raise MissingDependency(
            f"writing a NeMo 2 checkpoint needs nemo-toolkit, which cannot be imported ({error})"
        ) from error

    shape = checkpoint.shape
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer: Any = None
        fixed: int | None = rows
        if checkpoint.tokenizer is not None:
            # NeMo copies the whole directory and keeps its name; hand it one that holds the tokenizer alone
            copy = Path(scratch) / "nemo_tokenizer"
            copy_tokenizer(checkpoint.tokenizer, copy)
            tokenizer = AutoTokenizer(str(copy))
            if tokenizer.vocab_size == shape.vocab_size:
                fixed = None
        config = nemo_config(shape, checkpoint.architecture, dtype=dtype, multiple=multiple, rows=fixed)
        context = TrainerContext(
            model=model_class(checkpoint.architecture)(config, tokenizer=tokenizer),
            trainer=nl.Trainer(devices=1, accelerator="cpu", strategy=nl.MegatronStrategy(ckpt_save_optimizer=False)),
            extra={},
        )
        context.io_dump(directory, yaml_attrs=["model"])


def _find_tokenizer(context: Path, content: dict[str, Any]) -> Path | None:
    """The HF tokenizer inside ``context/``; a name that leads out of it is not followed."""
    described = content.get("tokenizer")
    name = described.get("pretrained_model_name") if isinstance(described, dict) else None
    candidates = [context / name] if isinstance(name, str) and name else []
    for candidate in [*candidates, context / "nemo_tokenizer"]:
        inside = candidate.resolve().is_relative_to(context.resolve())
        if inside and candidate.is_dir() and (directory := find_tokenizer(candidate)):
            return directory
    return None
