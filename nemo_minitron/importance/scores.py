"""The score file: one number for every unit of a model, by global index and so for any parallel layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.axes import parameters
from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.fingerprint import with_content
from nemo_minitron.errors import CheckpointError, MinitronError, NonFiniteError, ShapeError
from nemo_minitron.importance.subject import check_subject
from nemo_minitron.parsing import parse_json
from nemo_minitron.runtime.atomic import write_aside
from nemo_minitron.shape import ModelShape, require_uniform

__all__ = ["Scores", "fingerprint", "save_criteria"]

FORMAT_VERSION = 2
#: Version 1 had no estimator but activations, and no experts.
_READABLE = (1, 2)
TENSORS = ("ffn", "heads", "groups", "hidden", "layers", "experts")
_TENSOR_FILE, _META_FILE = "scores.safetensors", "scores.json"


@dataclass(frozen=True)
class Scores:
    """Scores of all units; higher is more important. Tensors are float64 on the CPU.

    Attributes:
        ffn: ``[L, F]`` MLP neurons; ``[L, E, F]`` of a mixture of experts.
        heads: ``[L, A]`` query heads.
        groups: ``[L, G]`` query groups.
        hidden: ``[H]`` channels of the residual stream.
        layers: ``[L]``; block influence, between 0 (the layer changes nothing) and 2, under the activation estimator.
        shape: of the model that was scored.
        samples, tokens: amount of calibration data.
        sequence, batch: aggregations, by name ("sum" over the sequence under "taylor", "none" and "none" under
            "magnitude" and "reconstruction").
        fingerprint: of the model's weights; None if it was not known.
        estimator: by name, such as "activation", "taylor", "reconstruction" or "magnitude".
        experts: ``[L, E]`` experts; None for a dense model.
        loss: of "taylor", "labels" or "kl"; None for other estimators, and in files of earlier releases.
    """

    ffn: torch.Tensor
    heads: torch.Tensor
    groups: torch.Tensor
    hidden: torch.Tensor
    layers: torch.Tensor
    shape: ModelShape
    samples: int
    tokens: int
    sequence: str
    batch: str
    fingerprint: str | None = None
    estimator: str = "activation"
    experts: torch.Tensor | None = None
    loss: str | None = None

    def __post_init__(self) -> None:
        require_uniform(self.shape, "scoring")
        if self.experts is not None and self.shape.num_moe_experts is None:
            raise ShapeError("scores of experts: the model has none; score this model again")
        for name, expected in _sizes(self.shape).items():
            tensor = getattr(self, name)
            if tensor is None or tuple(tensor.shape) != expected:
                actual = "nothing" if tensor is None else f"shape {list(tensor.shape)}"
                raise ShapeError(
                    f"scores of {name}: {actual} where the model needs {list(expected)}; score the whole model again"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(
                    f"scores of {name}: NaN or infinite values; check the model's weights and score it again"
                )

    def check(self, shape: ModelShape, model_fingerprint: str | None, *, where: str) -> None:
        """Make sure that these are the scores of a given model.

        Args:
            shape: of the model to be pruned.
            model_fingerprint: of its weights; None, here or in the scores, leaves them unchecked.
            where: name of the scores in errors.

        Raises:
            ShapeError: if the sizes differ.
            CheckpointError: if the weights differ.
        """
        check_subject(
            (self.shape, self.fingerprint), (shape, model_fingerprint), where=where, remedy="score this model first"
        )

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the directory ``path`` with ``scores.safetensors`` and ``scores.json``: whole, or not at all.

        Raises:
            CheckpointError: if something is there and ``overwrite`` is false, or the disk is full.
        """
        from safetensors.torch import save

        with write_aside(Path(path), overwrite=overwrite, error=CheckpointError) as aside:
            aside.mkdir()
            tensors = {name: getattr(self, name).contiguous() for name in _sizes(self.shape)}
            # bytes, because save_file makes a file that only its owner may read
            (aside / _TENSOR_FILE).write_bytes(save(tensors))
            meta = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in TENSORS}
            if self.loss is None:
                del meta["loss"]
            meta = {"format_version": FORMAT_VERSION, **meta, "shape": self.shape.to_dict()}
            (aside / _META_FILE).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: if it is missing, damaged, incomplete, of another version, or not finite.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(path)
        meta = _read_meta(path / _META_FILE)
        file = path / _TENSOR_FILE
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be read ({error}); score the model again") from None
        try:
            shape = ModelShape.from_dict(meta.pop("shape"))
            sizes = _sizes(shape)
            if missing := [name for name in sizes if name not in tensors]:
                raise CheckpointError(f"{file}: has no scores of {', '.join(missing)}; score the model again")
            for name, expected in sizes.items():
                size = tuple(tensors[name].shape)
                if size != expected and len(size) == len(expected) and size[0] < shape.num_layers != size[0]:
                    raise CheckpointError(
                        f"{file}: {name} has the scores of {size[0]} layers, the model has {shape.num_layers}; "
                        "score the whole model again"
                    )
            return cls(**{name: tensors[name].double() for name in sizes}, shape=shape, **meta)
        except CheckpointError:
            raise
        except MinitronError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path / _META_FILE}: is not complete ({error}); score the model again") from None


def save_criteria(scores: Sequence[Scores], path: Path) -> None:
    """Write scores of several criteria into the directory ``path``: the first there, the others in ``criteria/``.

    Not atomic by itself: ``path`` is a directory that the caller puts in place.
    """
    scores[0].save(path, overwrite=True)
    for other in scores[1:]:
        other.save(path / "criteria" / f"{other.sequence}-{other.batch}")


def fingerprint(checkpoint: Checkpoint) -> str:
    """A hash of a checkpoint's weights, from its norms and one layer.

    A SHA-256, in hexadecimal and cut to 32 digits, over the shape, all normalisation weights and the last layer's
    matrices, as float32: the same for every format and parallel layout of the same weights, different after training.
    Behind it stands the hash of all tensors, where this suite wrote them
    (:func:`~nemo_minitron.checkpoints.fingerprint.with_content`).
    """
    # Sizes that a model does not have are left out, so that a size which only other families have changes nothing.
    sizes = {name: size for name, size in checkpoint.shape.to_dict().items() if size is not None}
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode())
    for entry in parameters(checkpoint.family, checkpoint.shape):
        if len(entry.row.axes) == 1 or entry.layer == checkpoint.shape.num_layers - 1:
            digest.update(entry.name.encode())
            digest.update(checkpoint.weights.tensor(entry.name).float().contiguous().numpy().tobytes())
    return with_content(digest.hexdigest()[:32], checkpoint)


def _sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    layers, experts = (shape.num_layers,), () if shape.num_moe_experts is None else (shape.num_moe_experts,)
    return {
        "ffn": (*layers, *experts, shape.ffn_hidden_size),
        "heads": (shape.num_layers, shape.num_attention_heads),
        "groups": (shape.num_layers, shape.num_query_groups),
        "hidden": (shape.hidden_size,),
        "layers": layers,
        **({"experts": (*layers, *experts)} if experts else {}),
    }


def _read_meta(file: Path) -> dict[str, Any]:
    try:
        meta = parse_json(file.read_text(encoding="utf-8"))
        version = meta.pop("format_version")
    except FileNotFoundError:
        raise CheckpointError(
            f"{file.parent}: no scores there ({file.name} is missing); run `minitron score`"
        ) from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); score the model again") from None
    if version not in _READABLE:
        raise CheckpointError(
            f"{file}: has format version {version}, this release reads {' and '.join(map(str, _READABLE))}; "
            "score the model again"
        )
    return meta
