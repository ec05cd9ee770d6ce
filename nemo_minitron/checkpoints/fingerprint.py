"""A short hash that identifies a model: the same for the same weights in any format and at any path."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from nemo_minitron import axes

if TYPE_CHECKING:
    from nemo_minitron.checkpoints.base import Checkpoint

__all__ = ["model_fingerprint", "same_fingerprint", "with_content"]

#: Architecture fields that do not change the logits of given tokens. The dtype counts with each tensor.
_NOT_PART_OF_THE_FUNCTION = (
    "dtype",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "generation",
)


def model_fingerprint(checkpoint: Checkpoint) -> str:
    """Hash the sizes, the constants of the forward pass, all vectors, and the matrices of the first and last layer.

    Training and pruning change all of these. Reading no other matrices takes seconds for a model of any depth. Values
    are hashed in the dtype that they are stored in: a model that was cast computes other logits. All other tensors are
    covered by the hash that was taken when this suite wrote them, where it did: see :func:`with_content`.

    Compare two of them by :func:`same_fingerprint`.

    Returns:
        16 hexadecimal digits; with that hash, ``<16 digits>-<dtype>-<16 digits>``.

    Raises:
        CheckpointError: if a tensor cannot be read.
    """
    import torch

    digest = hashlib.sha256()
    constants = checkpoint.architecture.to_dict()
    for field in _NOT_PART_OF_THE_FUNCTION:
        constants.pop(field, None)
    digest.update(json.dumps([checkpoint.shape.to_dict(), constants], sort_keys=True, default=str).encode())
    outer = {0, checkpoint.shape.num_layers - 1}
    for entry in axes.parameters(checkpoint.family, checkpoint.shape):
        if len(entry.row.axes) == 1 or entry.layer in outer:
            tensor = checkpoint.weights.tensor(entry.name).contiguous()
            digest.update(f"{entry.name} {tensor.dtype}".encode())
            digest.update(tensor.view(torch.uint8).numpy())
    return with_content(digest.hexdigest()[:16], checkpoint)


def with_content(fingerprint: str, checkpoint: Checkpoint) -> str:
    """A fingerprint of some tensors, followed by the hash of all of them that the model record holds, if it does.

    Weights that something wraps (pruned, cast) have no such hash.
    """
    content = getattr(checkpoint.weights, "content", None)
    return f"{fingerprint}-{content}" if isinstance(content, str) else fingerprint


def same_fingerprint(first: str, second: str) -> bool:
    """Whether two fingerprints are of the same weights, as far as both say.

    The hash of all tensors is compared if both have it, of one dtype. Earlier releases, and models of other programs,
    do not; what the other fingerprints hash may not depend on the dtype.
    """
    (one, *content), (other, *other_content) = first.split("-"), second.split("-")
    comparable = content and other_content and content[0] == other_content[0]
    return one == other and (not comparable or content == other_content)
