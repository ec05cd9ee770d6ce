"""GGUF -> Hugging Face directory: a file of llama.cpp, quantized or not, becomes an ordinary checkpoint.

The numbers are those that llama.cpp's own ``gguf`` package dequantizes, one tensor at a time.
"""

from __future__ import annotations

import atexit
import dataclasses
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron import axes
from nemo_minitron.accounting import by_pattern, refusable
from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.formats.entry import WriteOptions
from nemo_minitron.checkpoints.formats.gguf import known
from nemo_minitron.checkpoints.formats.gguf.architectures import (
    ARCHITECTURES,
    DEFAULTS,
    GGUFArchitecture,
    architecture_of,
)
from nemo_minitron.checkpoints.formats.gguf.header import GGUFContent, read_gguf
from nemo_minitron.checkpoints.formats.gguf.places import Place, names_there
from nemo_minitron.checkpoints.formats.gguf.rope import DIVISORS, rotary_scaling
from nemo_minitron.checkpoints.formats.gguf.tokenizer import write_tokenizer
from nemo_minitron.checkpoints.formats.huggingface import names as naming
from nemo_minitron.checkpoints.formats.huggingface.checkpoint import open_hf, write_hf
from nemo_minitron.checkpoints.formats.huggingface.config import from_hf
from nemo_minitron.errors import CheckpointError
from nemo_minitron.runtime.atomic import write_aside
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    import torch

__all__ = ["GGUFWeights", "convert_gguf", "describe_gguf", "is_gguf", "open_gguf"]

#: Keys of a header below the architecture's name that every model has.
_NEEDED = ("context_length", "block_count", "embedding_length", "feed_forward_length", "attention.head_count")
_IDS = {"bos": "bos", "eos": "eos", "pad": "padding"}


def is_gguf(path: Path) -> bool:
    """Whether a path has the name of a GGUF file."""
    return path.suffix == ".gguf" and not path.is_dir()


def convert_gguf(
    source: str | Path, target: str | Path, *, dtype: str = "float32", overwrite: bool = False
) -> Checkpoint:
    """Convert a GGUF file into a HF directory and open it.

    Memory holds one tensor at a time. Every key of the header and every tensor is used, or is known to change nothing,
    or is refused, or named in a warning.

    Args:
        source: the ``.gguf`` file; of a model in several parts any of them, with the others beside it.
        target: the directory to write.
        dtype: of the tensors written. Quantized weights do not fit bfloat16 exactly.
        overwrite: replace what stands at ``target``.

    Raises:
        CheckpointError: if the file is missing, truncated, of another architecture, or holds what is not supported; if
            ``target`` exists; if the disk is full.
        MissingDependency: without the ``gguf`` package.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    with tempfile.TemporaryDirectory() as scratch:
        model = describe_gguf(source, Path(scratch), dtype=dtype)
        target.parent.mkdir(parents=True, exist_ok=True)
        with write_aside(target, overwrite=overwrite, error=CheckpointError) as partial:
            write_hf(model, partial, WriteOptions(dtype=dtype, scratch=Path(scratch) / "parts"))
    return open_hf(target)


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file as it stands: its tensors are dequantized when they are asked for, in float32.

    The tokenizer's files are made in a temporary directory that lives as long as the process.

    Raises:
        CheckpointError, MissingDependency: as :func:`convert_gguf`.
    """
    directory = Path(tempfile.mkdtemp(prefix="nemo_minitron_tokenizer_"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return describe_gguf(path, directory)


def describe_gguf(source: str | Path, directory: Path, *, dtype: str = "float32") -> Checkpoint:
    """A GGUF file by its header: sizes, constants, and tensors that are read when they are asked for, in float32.

    Args:
        source: as :func:`convert_gguf` takes it.
        directory: an empty one, which gets the tokenizer's files.
        dtype: that the checkpoint says it has.

    Raises:
        CheckpointError, MissingDependency: as :func:`convert_gguf`, for what the header says.
    """
    content = read_gguf(Path(source).expanduser())
    name = content.fields.get("general.architecture")
    entry = architecture_of(
        str(name),
        experts=bool(content.fields.get(f"{name}.expert_count")),
        biases=all(f"blk.0.attn_{part}.bias" in content.tensors for part in "qkv"),
    )
    if entry is None:
        supported = ", ".join(map(repr, ARCHITECTURES))
        raise CheckpointError(f"{source}: architecture {name!r} is not supported; supported: {supported}")
    shape, architecture = from_hf(_config(content, str(name), entry), content.path)
    architecture = dataclasses.replace(architecture, dtype=dtype)
    weights = GGUFWeights(
        content, shape, architecture.family, entry, names_there(str(name), shape, architecture.family)
    )
    weights.check()
    write_tokenizer(content, directory)
    _check_fields(content, str(name), entry)
    return Checkpoint(shape, architecture, weights, directory, content.path, "gguf")


@dataclass(frozen=True)
class GGUFWeights:
    """Lazily read tensors of a GGUF file under canonical names, in float32. Implements ``Weights``.

    Attributes:
        content: the file.
        shape, family: the model's.
        entry: its architecture.
        names_there: name in transformers -> where it is in the file.
    """

    content: GGUFContent
    shape: ModelShape
    family: str
    entry: GGUFArchitecture
    names_there: dict[str, Place]

    def names(self) -> Sequence[str]:
        """Canonical names in the order of the forward pass."""
        return [entry.name for entry in axes.parameters(axes.family(self.family), self.shape)]

    def tensor(self, name: str) -> torch.Tensor:
        """The canonical tensor.

        Raises:
            CheckpointError: for a quantization that cannot be undone.
        """
        entry = axes.entry(axes.family(self.family), self.shape, name)
        parts = [self.part(part) for part in naming.hf_parts(self.family, entry)]
        return naming.merge(entry.row.axes, parts, entry.sizes)

    def part(self, name: str) -> torch.Tensor:
        """The tensor of this name in transformers."""
        there = self.names_there[name]
        change = self.entry.changes.get(".".join(there.name.split(".")[-2:]))
        tensor = self.content.tensor(there.name, there.expert)
        return tensor if change is None else change.undo(tensor, self.shape)

    def check(self) -> None:
        """Compare names and shapes with the header.

        Raises:
            CheckpointError: naming tensors that are missing, of another shape, or have no place in the model.
        """
        path, stored = self.content.path, self.content.tensors
        places = {there.name for there in self.names_there.values()}
        if missing := [
            name for name in dict.fromkeys(there.name for there in self.names_there.values()) if name not in stored
        ]:
            raise CheckpointError(
                f"{path}: {len(missing)} tensors that its header asks for are missing, such as {', '.join(missing[:3])}"
            )
        shapes: dict[str, tuple[int, ...]] = {}
        for entry in axes.parameters(axes.family(self.family), self.shape):
            shapes |= naming.hf_parts(self.family, entry)
        for name, there in self.names_there.items():
            size, asked = self.content.shape(there.name), shapes[name]
            wanted = asked if there.expert is None else (self.shape.num_moe_experts, *asked)
            if size != wanted:
                raise CheckpointError(
                    f"{path}: {there.name} has shape {list(size)} where the header's sizes ask for {list(wanted)}"
                )
        used = {*places, DIVISORS}
        unknown = [name for name in stored if name not in used and not by_pattern([name], known.TENSORS)]
        if unknown:
            raise CheckpointError(
                f"{path}: {len(unknown)} tensors have no place in a {self.family} model, such as "
                f"{', '.join(unknown[:3])}; the model computes more than its architecture says"
            )


def _config(content: GGUFContent, name: str, entry: GGUFArchitecture) -> dict[str, Any]:
    """The ``config.json`` that the header describes."""
    fields, config = content.fields, {"architectures": [entry.title], **DEFAULTS, **entry.constants}
    if missing := [f"{name}.{key}" for key in _NEEDED if fields.get(f"{name}.{key}") is None]:
        raise CheckpointError(f"{content.path}: its header has no {', '.join(missing)}; it is not a whole model")
    for key, there in entry.keys.items():
        value = fields.get(f"{name}.{key}")
        if isinstance(value, list):
            if key in entry.by_layer:
                config |= entry.by_layer[key](value)
                continue
            if len(set(value)) > 1:
                raise CheckpointError(f"{content.path}: {name}.{key} differs between layers, which is not supported")
            value = value[0] if value else None
        if value is not None:
            config[there] = _decimal(value) if isinstance(value, float) else value
    if "token_embd.weight" not in content.tensors:
        raise CheckpointError(f"{content.path} has no token_embd.weight; it is not a whole model")
    config.setdefault("vocab_size", content.shape("token_embd.weight")[0])
    config["tie_word_embeddings"] = "output.weight" not in content.tensors
    config |= {f"{kind}_token_id": fields.get(f"tokenizer.ggml.{there}_token_id") for kind, there in _IDS.items()}
    head = config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config |= entry.derived(config)
    width = fields.get(f"{name}.attention.value_length")
    if width not in (None, head):
        raise CheckpointError(
            f"{content.path}: {name}.attention.value_length={width} differs from the keys' {head}, which is not "
            "supported"
        )
    turned = fields.get(f"{name}.rope.dimension_count")
    if turned not in (None, head):
        config["partial_rotary_factor"] = turned / head  # refused by families without such a factor
    config["rope_scaling"] = rotary_scaling(content, name, theta=config["rope_theta"], head_dim=turned or head)
    return config


def _decimal(value: float) -> float:
    """The shortest number that is the same in float32: 9.99999974e-06 was written as 1e-05."""
    import numpy as np

    return float(str(np.float32(value)))


def _check_fields(content: GGUFContent, name: str, entry: GGUFArchitecture) -> None:
    """Account for the keys of the header that nobody asked for.

    Raises:
        CheckpointError: for keys that may change what the model computes.
    """
    left = content.fields.left()
    harmless = by_pattern(left, known.KEYS)
    harmless |= {key: "its neutral value" for key, values in known.NEUTRAL.items() if left.get(key) in values}
    neutral = {f"{name}.{key}": value for key, value in entry.neutral.items()}
    active = refusable(left, source=content.path, harmless=harmless, neutral=neutral)
    if active:
        named = ", ".join(f"{key}={str(value)[:80]}" for key, value in active.items())
        raise CheckpointError(
            f"{content.path}: its header has {named}, which is not supported and may change what the model computes; "
            "import the model's Hugging Face directory"
        )
