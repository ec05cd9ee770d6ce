"""The checks that ``faults()`` methods share."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from nemo_minitron.config.tables import WrittenFormats

__all__ = [
    "AGGREGATIONS",
    "AUTO",
    "BALANCES",
    "DEPTH_CRITERIA",
    "DEPTH_FORMS",
    "DTYPES",
    "LOGITS",
    "LATENCIES",
    "MEMORY_USES",
    "ON_BAD_RECORD",
    "RECOMPUTE",
    "TAYLOR_LOSSES",
    "TEACHER_PLACEMENTS",
    "choice",
    "format_list_faults",
    "not_negative",
    "one_of",
    "positive",
    "written_formats",
]

AGGREGATIONS = ("mean", "l1", "l2", "variance", "max")
DTYPES = ("float32", "bfloat16")
TAYLOR_LOSSES = ("labels", "kl")
#: Leaves a precision to the suite, which takes the faster on the machine that runs the stage.
AUTO = "auto"
DEPTH_CRITERIA = ("block_influence", "loss", "task")
DEPTH_FORMS = ("lowest", "contiguous", "greedy")
TEACHER_PLACEMENTS = ("shared", "own_layout", "own_ranks")
BALANCES = ("fixed", "dynamic")
#: Megatron's ``recompute_granularity``, by what is kept: everything, all but the attention's core, layers' inputs.
RECOMPUTE = ("none", "selective", "full")
MEMORY_USES = ("inference", "training")
LATENCIES = ("prefill", "decode")
#: How a training makes its logits: all of a micro-batch at once, or a chunk of tokens at a time.
LOGITS = ("whole", "chunks")
#: What becomes of a record that cannot be used.
ON_BAD_RECORD = ("refuse", "skip")


def written_formats() -> list[str]:
    """The names of the checkpoint formats that can be written."""
    return WrittenFormats().names()


def format_list_faults(names: Iterable[str], *, exports: bool = False) -> list[str]:
    """The faults of the entries of ``formats`` that cannot be written.

    Args:
        names: the entries.
        exports: formats that only other programs read can be.
    """
    known = WrittenFormats(exports=exports).names()
    return [f"formats: {name!r} must be one of {', '.join(known)}" for name in names if name not in known]


def positive(config: Any, *names: str) -> list[str]:
    """Faults of the named fields that are given and not above zero."""
    values = ((name, getattr(config, name)) for name in names)
    return [f"{name}={value}: must be above 0" for name, value in values if value is not None and not value > 0]


def not_negative(config: Any, *names: str) -> list[str]:
    """Faults of the named fields that are given and below zero."""
    values = ((name, getattr(config, name)) for name in names)
    return [f"{name}={value}: must be 0 or more" for name, value in values if value is not None and value < 0]


def choice(config: Any, name: str, choices: Collection[str], *, also: Collection[str] = ()) -> list[str]:
    """The fault of a field that is given and neither one of ``choices`` nor of ``also``."""
    value = getattr(config, name)
    if value is None or value in choices or value in also:
        return []
    return [f"{name}={value}: must be one of {', '.join([*choices, *also])}"]


def one_of(config: Any, *names: str) -> list[str]:
    """The fault of alternatives of which not exactly one is given."""
    given = [name for name in names if getattr(config, name) is not None]
    if len(given) == 1:
        return []
    state = f"{' and '.join(given)} are both given" if given else "none is given"
    return [f"{names[0]}: give exactly one of {', '.join(names)} ({state})"]
