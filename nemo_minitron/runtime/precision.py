"""Whether a process should compute in bfloat16: what ``precision: auto`` and ``runtime.dtype: auto`` take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.runtime.device import Device

__all__ = ["Choice", "choose"]

#: Of a processor, as Linux names them: what makes products in bfloat16 fast.
_FEATURES = ("amx_bf16", "avx512_bf16")
_CPUINFO = Path("/proc/cpuinfo")
#: Rows, inner size and columns of the product that is timed: 1.1 GFLOP.
_ROWS, _INNER, _COLUMNS = 512, 1024, 1024
#: How many times faster the product must be: around it a mixed precision casts weights and gradients.
_MARGIN = 1.5
#: No further product begins after so many seconds.
_SECONDS = 1.0
_ROUNDS = 8


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why.

    Attributes:
        bfloat16: bfloat16, else float32.
        reason: for the record, in words.
    """

    bfloat16: bool
    reason: str


def choose(device: Device) -> Choice:
    """The faster of float32 and bfloat16 for matrix products on this process's device.

    On CUDA bfloat16 from compute capability 8.0 on. On the CPU bfloat16 where the processor has AMX or AVX512-BF16 and
    a product takes at most two thirds of the time that float32 takes. That is measured, with the threads of this
    process, in at most about a second of the processor's time: the clock would count the machine's other work.
    """
    import torch

    if device.is_cuda:
        major, minor = torch.cuda.get_device_capability(device.torch)
        return Choice(major >= 8, f"compute capability {major}.{minor}")
    try:
        features = _features(_CPUINFO.read_text())
    except OSError:
        features = []
    if not features:
        return Choice(False, "the processor has neither AMX nor AVX512-BF16")
    wide, narrow = _times(lambda dtype: _product(getattr(torch, dtype)), ("float32", "bfloat16"))
    return Choice(
        wide >= _MARGIN * narrow,
        f"{' and '.join(features)}; a product of {_ROWS} x {_INNER} x {_COLUMNS} took {1e3 * wide:.0f} ms in float32 "
        f"and {1e3 * narrow:.0f} ms in bfloat16 (bfloat16 is taken from {_MARGIN} times the speed on)",
    )


def _features(text: str) -> list[str]:
    """Which of :data:`_FEATURES` the first processor of a ``/proc/cpuinfo`` has."""
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return [feature for feature in _FEATURES if feature in line.split()]


def _product(dtype: object) -> float:
    """Seconds of the processor for one product."""
    import torch

    assert isinstance(dtype, torch.dtype)
    inputs = torch.full((_ROWS, _INNER), 0.5, dtype=dtype)
    weight = torch.full((_COLUMNS, _INNER), 0.5, dtype=dtype)
    started = time.process_time()
    torch.nn.functional.linear(inputs, weight)
    return time.process_time() - started


def _times(seconds: Callable[[str], float], names: tuple[str, str]) -> tuple[float, float]:
    """The least seconds of each, in turn, so that whatever slows the machine slows both; the first round warms up."""
    until = time.process_time() + _SECONDS
    first = [seconds(name) for name in names]
    best = [float("inf")] * 2
    for _ in range(_ROUNDS):
        if time.process_time() > until:
            break
        best = [min(before, seconds(name)) for before, name in zip(best, names, strict=True)]
    # A machine so slow that one round took the whole time: its warm-up is small beside it.
    one, other = (warm if best_of == float("inf") else best_of for warm, best_of in zip(first, best, strict=True))
    return one, other
