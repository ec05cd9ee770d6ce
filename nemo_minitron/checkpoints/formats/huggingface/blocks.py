"""``block_configs`` of a ``config.json``: layers with sizes of their own, as NVIDIA's Llama-Nemotron models have them.

The keys are those of ``nvidia/Llama-3_1-Nemotron-51B-Instruct`` and its successors (``DeciLMForCausalLM``): of each
layer ``attention.n_heads_in_group``, ``ffn.ffn_mult`` and ``no_op`` of both. A newer form, of Puzzletron in
Model-Optimizer, has ``num_key_value_heads`` and ``intermediate_size`` instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_minitron.errors import CheckpointError
from nemo_minitron.shape import LayerShape, ModelShape

__all__ = ["ffn_size", "read_blocks", "write_blocks"]

_MULTIPLE = 256  # of which every width that ffn_mult can state is one
#: Keys of a part that say nothing more, or are read; every other one that is set means another model.
_READ = ("no_op", "n_heads_in_group", "num_key_value_heads", "ffn_mult", "intermediate_size", "gated", "hidden_act")


def ffn_size(ffn_mult: float, hidden_size: int) -> int:
    """The width of an MLP by its multiplier: two thirds of it times the hidden size, rounded up to 256."""
    return -(-int(2 * ffn_mult * hidden_size / 3) // _MULTIPLE) * _MULTIPLE


def read_blocks(config: Mapping[str, Any]) -> tuple[LayerShape, ...]:
    """The sizes of each layer.

    Args:
        config: a ``config.json`` with ``block_configs``, ``num_hidden_layers``, ``num_attention_heads`` and
            ``hidden_size``.

    Raises:
        CheckpointError: if there is not one block for each layer, or a block is something that a layer here cannot be;
            all of them are named.
        KeyError: if one of the keys is missing.
    """
    blocks, layers = config["block_configs"], config["num_hidden_layers"]
    if not isinstance(blocks, Sequence) or len(blocks) != layers:
        count = len(blocks) if isinstance(blocks, Sequence) else type(blocks).__name__
        raise CheckpointError(f"block_configs: {count} entries for num_hidden_layers={layers}; each layer needs one")
    faults: list[str] = []
    found = [
        LayerShape(
            ffn_hidden_size=_width(block, config, f"block_configs[{number}].ffn", faults),
            num_query_groups=_groups(block, config, f"block_configs[{number}].attention", faults),
        )
        for number, block in enumerate(blocks)
    ]
    if faults:
        raise CheckpointError("; ".join(faults))
    return tuple(found)


def _groups(block: Any, config: Mapping[str, Any], where: str, faults: list[str]) -> int:
    part = _part(block, where, faults)
    if part is None or part.get("no_op"):
        return 0
    heads, each, groups = config["num_attention_heads"], part.get("n_heads_in_group"), part.get("num_key_value_heads")
    if isinstance(groups, int) and each is None:
        return groups
    if not isinstance(each, int) or each < 1 or heads % each:
        faults.append(
            f"{where}.n_heads_in_group={each!r}: must be a whole number that divides num_attention_heads={heads}"
        )
        return 0
    return int(heads // each)


def _width(block: Any, config: Mapping[str, Any], where: str, faults: list[str]) -> int:
    part = _part(block, where, faults)
    if part is None or part.get("no_op"):
        return 0
    factor, width = part.get("ffn_mult"), part.get("intermediate_size")
    if isinstance(width, int) and factor is None:
        return width
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < float("inf"):
        faults.append(f"{where}.ffn_mult={factor!r}: must be a number above 0")
        return 0
    return ffn_size(factor, config["hidden_size"])


def _part(block: Any, where: str, faults: list[str]) -> Mapping[str, Any] | None:
    """The settings of a block's attention or MLP; None, with a fault added, if such a layer is not supported."""
    part = block.get(where.rpartition(".")[2]) if isinstance(block, Mapping) else None
    if not isinstance(part, Mapping):
        faults.append(f"{where}: is missing")
        return None
    other = [key for key, value in part.items() if key not in _READ and value]
    if part.get("gated") is False:
        other.append("gated")
    if part.get("hidden_act") not in (None, "silu"):
        other.append("hidden_act")
    faults += [f"{where}.{key}={part[key]!r} is not supported" for key in other]
    return None if other else part


def write_blocks(shape: ModelShape) -> list[dict[str, Any]]:
    """``block_configs`` of a model whose layers have sizes of their own.

    Widths are given as multipliers, which all readers of these models know, if all widths can be; else as they are.
    """
    widths = [sizes.ffn_hidden_size for sizes in shape.each()]
    factors = {width: 3 * width / (2 * shape.hidden_size) for width in widths}
    stated = all(ffn_size(factor, shape.hidden_size) == width for width, factor in factors.items())
    blocks = []
    for sizes in shape.each():
        width = sizes.ffn_hidden_size
        size = {"ffn_mult": factors[width] or None} if stated else {"intermediate_size": width or None}
        blocks.append(
            {
                "attention": {
                    "n_heads_in_group": sizes.heads_per_group or None,
                    "no_op": not sizes.num_query_groups,
                    "replace_with_linear": False,
                },
                "ffn": {**size, "no_op": not width, "replace_with_linear": False},
            }
        )
    return blocks
