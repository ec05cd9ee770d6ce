"""How many bytes checkpoints, training states, logit caches and token blocks take on a disk.

The numbers are those of the tensors, which all formats store as they are. Not counted: what a format writes around them
(a few kilobytes for each file), tokenizers, records and logs.

- weights: every parameter in the dtype that is written. NeMo's formats pad the vocabulary to a multiple of 128, and
  store tied embeddings once.
- a training state: the weights as they are trained, and Adam's two moments and a copy of the weights in fp32, which the
  distributed optimizer of Megatron keeps under fp32 training too: 16 bytes a parameter, in mixed precision 14.
- while a training runs there are up to three states: the last one, the one before it (``previous/``), and the one that
  is being written.
- an entry of a logit cache: see :func:`logits_bytes`.
"""

from __future__ import annotations

import math

from nemo_minitron import axes
from nemo_minitron.planning.model import Model
from nemo_minitron.shape import padded_vocab

__all__ = ["blocks_bytes", "logits_bytes", "states_at_once", "training_state_bytes", "weights_bytes"]

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
#: Of a parameter, beside the trained weights: two moments and the fp32 weights.
_OPTIMIZER = 12
#: Tokens from which on an id takes three bytes instead of two.
_WIDE = 1 << 16
#: Bytes of a position in a compact cache beside its tokens and the mass that is left over: their number, the least
#: log-probability, its part of the shard's order of the vocabulary.
_COMPACT_POSITION = 3


def weights_bytes(model: Model, dtype: str | None = None, *, padded: bool = True, tensor: int = 1) -> float:
    """Bytes of a checkpoint's weights.

    Args:
        model: sizes and constants.
        dtype: of the written tensors; None keeps the model's.
        padded: the format pads the vocabulary, as NeMo's do.
        tensor: parallel size whose padding the vocabulary has.
    """
    shape = model.shape
    if padded:
        shape = shape.replace(vocab_size=padded_vocab(shape.vocab_size, tensor=tensor))
    return axes.parameter_count(model.table, shape) * _BYTES.get(dtype or model.architecture.dtype, 4)


def training_state_bytes(model: Model, precision: str, *, tensor: int = 1) -> float:
    """Bytes of one training state: weights and optimizer.

    Args:
        model: that is trained.
        precision: "32" or "bf16-mixed".
        tensor: parallel size.
    """
    shape = model.shape.replace(vocab_size=padded_vocab(model.shape.vocab_size, tensor=tensor))
    trained = 2 if precision.startswith("bf16") else 4
    return axes.parameter_count(model.table, shape) * float(trained + _OPTIMIZER)


def states_at_once(steps: int, *intervals: int) -> int:
    """How many training states there are at most at one time; one is saved at each interval and at the end."""
    saved = {steps}
    for interval in intervals:
        saved.update(range(interval, steps, interval)[:3])
    return min(3, len(saved))


def logits_bytes(vocab_size: int, k: int | None, values: str, *, error_bound: float | None = None) -> float:
    """Bytes of one position of a logit cache: log-probabilities and ids, the mass that is left over, int8's scale.

    The size of a compact cache depends on the teacher and the text. The estimate is a fit to caches of SmolLM2-135M
    with 16 to 256 tokens, and within 5 % of those; how ids grow with the vocabulary is taken from how they grow as k
    falls.

    Args:
        vocab_size: of the teacher.
        k: tokens that are kept; None for all. With a ``top_p``, the most that are kept.
        values: type of the log-probabilities, or "compact".
        error_bound: of "compact", in nats.
    """
    if values == "compact" and k is not None and error_bound is not None:
        spread = math.log2(max(vocab_size / k, 1.0))
        id_bits = min(3.7 + 0.31 * spread, 2.0 + spread)  # no more than ids that are spread evenly need
        value_bits = max(1.0, 4.15 + 22 / max(k, 16) + math.log2(0.125 / error_bound))
        return k * (id_bits + value_bits) / 8 + 4 + _COMPACT_POSITION
    width = {"float32": 4, "int8": 1}.get(values, 2)
    scale = 8 if values == "int8" else 0
    if k is None:
        return vocab_size * width + scale
    return k * (width + (3 if vocab_size > _WIDE else 2)) + 4 + scale


def blocks_bytes(blocks: int, sequence_length: int, *, documents: bool = False) -> float:
    """Bytes of cached token blocks: ids and the number of a source, both of eight bytes.

    Args:
        blocks: number of them.
        sequence_length: tokens of a block, without the label of its last one.
        documents: the document of each token is kept too, in four bytes.
    """
    return blocks * ((sequence_length + 1) * (12 if documents else 8) + 8)
