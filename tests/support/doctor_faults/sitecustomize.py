"""Faults of a machine, in the processes that run the checks of ``minitron doctor --run``; not in the CPU reference.

Python imports this at its start where the folder is on ``PYTHONPATH``. ``DOCTOR_FAULTS`` names the faults.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

RANK = os.environ.get("RANK", "0")


def weights(module: Any) -> None:
    """Parameters that are loaded wrong."""
    load = module.load_into

    def load_into(chunks: Any, *args: Any, **kwargs: Any) -> None:
        load(chunks, *args, **kwargs)
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data.mul_(1.3)

    module.load_into = load_into


def gradient(module: Any) -> None:
    """A gradient that is scaled."""
    backward = module._Chunked.backward
    module._Chunked.backward = staticmethod(lambda ctx, *grads: backward(ctx, *(1.5 * grad for grad in grads)))


def resume(module: Any) -> None:
    """A training that begins anew where it should go on."""
    train = module.train
    module.train = lambda *args, **kwargs: train(*args, **{**kwargs, "resume": False})


def dropped(module: Any) -> None:
    """Large all-reduces that do not happen."""
    reduce = module.all_reduce

    def all_reduce(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return None if tensor.numel() >= 2**14 else reduce(tensor, *args, **kwargs)

    module.all_reduce = all_reduce


def killed(module: Any) -> None:
    """A rank that is killed."""

    def score_criteria(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if RANK == "1":
        module.score_criteria = score_criteria


def hanging(module: Any) -> None:
    """A rank that hangs."""
    if RANK == "1":
        module.DepthPrune.__call__ = lambda self, chunk: time.sleep(600)


FAULTS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "weights": ("nemo_minitron.checkpoints.live", weights),
    "gradient": ("nemo_minitron.distillation.losses.vocabulary_parallel", gradient),
    "resume": ("nemo_minitron.distillation.recipe", resume),
    "dropped": ("torch.distributed", dropped),
    "killed": ("nemo_minitron.importance.score", killed),
    "hanging": ("nemo_minitron.pruning.transforms", hanging),
}


class Injector(importlib.abc.MetaPathFinder):
    """Lets a module be changed as soon as it has been imported."""

    def __init__(self, faults: dict[str, Callable[[Any], None]]) -> None:
        self.faults = faults

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        fault = self.faults.pop(name, None)
        if fault is None:
            return None
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            fault(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "nemo_minitron.doctor.process" in sys.orig_argv and "/reference/" not in sys.orig_argv[-1]:
    sys.meta_path.insert(0, Injector(dict(FAULTS[name] for name in os.environ.get("DOCTOR_FAULTS", "").split())))
