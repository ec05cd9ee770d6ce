"""Whether the Triton kernels compute a loss, or plain torch: decided here alone.

Triton is used for logits on CUDA where it is installed (torch's CUDA builds bring it). Before its first use on a device
the kernels compute a small case; if they fail, or their numbers are wrong, a warning says so and the plain form is
used. The environment variable :data:`TRITON_VARIABLE` overrides this.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

import torch

from nemo_minitron.errors import ConfigError

__all__ = ["TRITON_VARIABLE", "triton_kernels"]

TRITON_VARIABLE = "MINITRON_TRITON"
"""Environment variable: "0" never uses Triton; "1" insists on it, also for logits on the CPU (which needs Triton's
interpreter, ``TRITON_INTERPRET=1``)."""

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TOLERANCE = 1e-3
"""Of the small case, in float32, as a part of the largest entry."""


def triton_kernels(*tensors: torch.Tensor | None) -> ModuleType | None:
    """:mod:`nemo_minitron.distillation.losses.triton_kernels` if it computes the loss of these, or None.

    Args:
        tensors: ``[n, v]`` each, of one device; float64, or rows whose columns are apart in memory, get None.

    Raises:
        ConfigError: if :data:`TRITON_VARIABLE` has another value, or insists on Triton where it does not work.
    """
    wanted = os.environ.get(TRITON_VARIABLE, "")
    if wanted not in ("", "0", "1"):
        raise ConfigError(f"{TRITON_VARIABLE}={wanted}: must be 0 or 1")
    given = [tensor for tensor in tensors if tensor is not None]
    if wanted == "0" or not (wanted == "1" or given[0].is_cuda):
        return None
    if any(tensor.dtype not in _DTYPES or (tensor.shape[-1] > 1 and tensor.stride(-1) != 1) for tensor in given):
        return None
    module, fault = _tried(given[0].device)
    if module is None and wanted == "1":
        raise ConfigError(f"{TRITON_VARIABLE}=1: {fault}; unset it, and the losses are computed by plain torch")
    return module


@functools.cache
def _tried(device: torch.device) -> tuple[ModuleType | None, str]:
    """The kernels, or why they cannot be used on a device."""
    if importlib.util.find_spec("triton") is None:
        return None, "Triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return None, "on the CPU Triton needs its interpreter (TRITON_INTERPRET=1)"
    try:
        module = importlib.import_module("nemo_minitron.distillation.losses.triton_kernels")
        errors = {name: error for name, error in _errors(module, device).items() if not error <= _TOLERANCE}
        fault = "its numbers are wrong: " + ", ".join(f"{name} by {error:.1e}" for name, error in errors.items())
    except Exception as error:  # whatever a compiler, a driver or another release of Triton raises
        errors, fault = {"": 0.0}, f"Triton failed with {type(error).__name__}: {error}"
    if not errors:
        return module, ""
    logger.warning(
        "losses on %s are computed by plain torch: %s; %s=0 avoids the trial", device, fault.strip(), TRITON_VARIABLE
    )
    return None, fault.strip()


def _errors(module: ModuleType, device: torch.device) -> dict[str, float]:
    """Errors of the kernels on a small case of two blocks, as parts of the largest entry of what float64 gives."""
    temperature = 2.0
    # No random numbers are drawn: a training's must not depend on this trial.
    steps = torch.arange(3 * (module.BLOCK + 77), device=device, dtype=torch.float32).view(3, -1)
    q, p = 3 * torch.sin(steps * steps), 3 * torch.cos(7 * steps)
    maxima, sums = module.statistics(p, q, temperature=temperature)
    _, reversed_sums = module.statistics(p, q, temperature=temperature, reverse=True)
    scales, means = temperature / sums[:2], reversed_sums[2] / sums[1]
    forward, reverse = torch.empty_like(q), torch.empty_like(q)
    module.derivative(p, q, forward, maxima, scales, temperature=temperature)
    module.derivative(p, q, reverse, maxima, scales, temperature=temperature, means=means)
    z_p, z_q = p.double() / temperature, q.double() / temperature
    tops = torch.stack([z_p.amax(-1), z_q.amax(-1)])
    exp_p, exp_q = (z_p - tops[0][:, None]).exp(), (z_q - tops[1][:, None]).exp()
    difference = z_p - z_q
    exact = torch.stack([exp_p.sum(-1), exp_q.sum(-1), (exp_p * difference).sum(-1), -(exp_q * difference).sum(-1)])
    of_p, of_q = (temperature * e / s[:, None] for e, s in ((exp_p, exact[0]), (exp_q, exact[1])))
    pairs = {
        "maxima": (maxima, tops),
        "sums": (torch.cat([sums, reversed_sums[2:]]), exact),
        "derivative of the forward KL": (forward, of_q - of_p),
        "derivative of the reverse KL": (reverse, of_q * (-difference - (exact[3] / exact[1])[:, None])),
    }
    return {name: ((a - b).abs().max() / b.abs().max()).item() for name, (a, b) in pairs.items()}
