"""The ways to store a weight in few bits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

__all__ = ["GROUP_SIZE", "SCHEMES", "Scheme", "scheme_of"]

GROUP_SIZE = 128
"""Columns that share a scale in int4, where none are given: what vLLM's and TensorRT-LLM's kernels are made for."""


@dataclass(frozen=True)
class Scheme:
    """A way to store the matrices of the layers; embeddings, norms, routers and the output layer stay as they are.

    Attributes:
        name: in the settings.
        title: for reports.
        algorithm: ``quant_algo`` in ``hf_quant_config.json``.
        recipe: name of ModelOpt's configuration.
        group: columns of a row that share a scale; None: a matrix has one scale.
        inputs: the inputs of the matrices are rounded too, by ranges that calibration measures.
        searched: calibration changes the weights (AWQ: it scales columns by their inputs, and norms by the inverse).
        packed_rows: two rows are stored in one byte, so their number must be even.
    """

    name: str
    title: str
    algorithm: str
    recipe: str
    group: int | None = None
    inputs: bool = False
    searched: bool = False
    packed_rows: bool = False


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp8", "FP8 weights and inputs", "FP8", "FP8_DEFAULT_CFG", inputs=True),
        Scheme(
            "int4",
            "INT4 weights, rounded to nearest",
            "W4A16_AWQ",  # readers have no other name for int4 weights; its column scales are 1
            "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
            group=GROUP_SIZE,
            packed_rows=True,
        ),
        Scheme(
            "int4_awq",
            "INT4 weights, AWQ",
            "W4A16_AWQ",
            "INT4_AWQ_CFG",
            group=GROUP_SIZE,
            searched=True,
            packed_rows=True,
        ),
        Scheme("nvfp4", "NVFP4 weights and inputs", "NVFP4", "NVFP4_DEFAULT_CFG", group=16, inputs=True),
    )
}


def scheme_of(name: str, group_size: int | None = None) -> Scheme:
    """A scheme by its name; ``group_size`` replaces the columns of a group of int4."""
    scheme = SCHEMES[name]
    return scheme if group_size is None or not scheme.packed_rows else dataclasses.replace(scheme, group=group_size)
