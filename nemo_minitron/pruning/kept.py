"""``kept.json`` beside a pruned checkpoint: the units that survived."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nemo_minitron.axes import KeptUnits
from nemo_minitron.errors import CheckpointError, ShapeError
from nemo_minitron.parsing import parse_json
from nemo_minitron.runtime.files import replace_file
from nemo_minitron.shape import ModelShape, require_uniform

__all__ = ["FILE_NAME", "kept_path", "load_kept", "read_kept", "read_live_kept", "save_kept"]

FILE_NAME = "kept.json"
LIVE_PRUNING = "pruning a live model (DepthPrune, WidthPrune, PruneTransform)"
FORMAT_VERSION = 2
#: Version 1 had neither experts nor a vocabulary.
_READABLE = (1, 2)


def kept_path(output: str | Path) -> Path:
    """The path of ``kept.json`` for a checkpoint: inside a directory, beside a ``.nemo`` file."""
    output = Path(output)
    return output.with_name(f"{output.name}.{FILE_NAME}") if output.suffix == ".nemo" else output / FILE_NAME


def save_kept(kept: KeptUnits, shape: ModelShape, path: str | Path) -> None:
    """Write ``kept``, the surviving units of a model of ``shape``, to the file ``path``: whole, or not at all."""
    path = Path(path)
    content = {
        "format_version": FORMAT_VERSION,
        "shape": shape.to_dict(),
        "target": kept.target(shape).to_dict(),
        "kept": {
            "layers": kept.layers,
            "hidden": kept.hidden,
            "ffn": kept.ffn,
            "groups": kept.groups,
            "heads": kept.heads,
            "experts": kept.experts,
            "expert_ffn": kept.expert_ffn,
            "vocab": kept.vocab,
        },
    }
    replace_file(path, json.dumps(content) + "\n")


def load_kept(path: str | Path) -> tuple[KeptUnits, ModelShape]:
    """The surviving units, and the shape of the unpruned model.

    Raises:
        CheckpointError: if the file is missing, damaged, of another version, or contradicts itself.
    """
    path = Path(path)
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        version = content["format_version"]
        if version not in _READABLE:
            raise CheckpointError(
                f"{path}: has format version {version}, this release reads {FORMAT_VERSION}; prune again"
            )
        shape = ModelShape.from_dict(content["shape"])
        kept = KeptUnits(**{name: _tuples(value) for name, value in content["kept"].items()})
        faults = kept.faults(shape)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ShapeError) as error:
        raise CheckpointError(f"{path}: is no readable record of kept units ({error}); prune again") from None
    if faults:
        raise CheckpointError(f"{path}: {faults[0]}; prune again")
    return kept, shape


def read_kept(kept: KeptUnits | str | Path) -> tuple[KeptUnits, ModelShape | None]:
    """The kept units, given or read from a file; and the shape of the unpruned model, which only a file states."""
    return load_kept(kept) if isinstance(kept, (str, os.PathLike)) else (kept, None)


def read_live_kept(kept: KeptUnits | str | Path) -> tuple[KeptUnits, ModelShape | None]:
    """:func:`read_kept` for the pruning of a live model, which needs layers that are all alike.

    Raises:
        ShapeError: if the layers of the unpruned model, or those of the pruned model, differ in size.
        CheckpointError: as :func:`load_kept`.
    """
    kept, shape = read_kept(kept)
    if shape is not None:
        for sizes in (shape, kept.target(shape)):
            require_uniform(sizes, LIVE_PRUNING)
    return kept, shape


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
