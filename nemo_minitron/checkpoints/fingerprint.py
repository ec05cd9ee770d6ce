"""A short hash that identifies a model: the same for the same weights in any format and at any path."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch

from nemo_minitron import axes

if TYPE_CHECKING:
    from nemo_minitron.checkpoints.base import Checkpoint

__all__ = ["model_fingerprint"]

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
    are hashed in the dtype that they are stored in: a model that was cast computes other logits.

    Returns:
        16 hexadecimal digits.

    Raises:
        CheckpointError: if a tensor cannot be read.
    """
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
    return digest.hexdigest()[:16]
