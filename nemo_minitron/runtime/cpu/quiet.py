"""Drop the messages that the stack prints at every start on a machine without CUDA, Apex and Transformer Engine.

Only the messages listed here are dropped, each by the beginning of its text and by its origin; errors and all other
warnings pass. Of NeMo's own logger the INFO lines are dropped too: it sets its level while it is imported, after
:func:`nemo_minitron.runtime.log.configure` has spoken.
"""

from __future__ import annotations

import logging
import re
import warnings
from dataclasses import dataclass

__all__ = ["RECORDS", "WARNINGS", "KnownRecord", "KnownWarning", "loud", "quiet"]


@dataclass(frozen=True)
class KnownWarning:
    """A Python warning to drop.

    Attributes:
        message: regular expression for the beginning of its text.
        category: its class.
        module: regular expression for the module that it is attributed to.
        why: why nobody needs to read it.
    """

    message: str
    category: type[Warning]
    module: str
    why: str


@dataclass(frozen=True)
class KnownRecord:
    """A log record to drop.

    Attributes:
        logger: exact name of its logger.
        message: regular expression for the beginning of its text.
        why: why nobody needs to read it.
    """

    logger: str
    message: str
    why: str


WARNINGS: tuple[KnownWarning, ...] = (
    KnownWarning(
        r"The pynvml package is deprecated", FutureWarning, r"torch\.cuda", "a dependency of NeMo; asks about GPUs only"
    ),
    KnownWarning(
        r"Transformer Engine and Apex are not installed\. Falling back",
        UserWarning,
        r"megatron\.core\.optimizer",
        "that is what the CPU layer is for",
    ),
    KnownWarning(
        r"Apex is not installed\. Falling back to Torch Norm",
        UserWarning,
        r"megatron\.core\.models",
        "that is what the CPU layer is for",
    ),
    KnownWarning(
        r"Attribute bert_layer_specs\.", UserWarning, r"megatron\.core\.models\.bert", "NeMo 1 imports BERT with GPT"
    ),
    KnownWarning(
        r"When using async grad allreduce it is recommended to set the environment variable CUDA_DEVICE_MAX_CONN",
        UserWarning,
        r"megatron\.core\.tensor_parallel\.layers",
        "orders kernels on a GPU",
    ),
    KnownWarning(
        r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
        UserWarning,
        r"nemo_minitron\.runtime\.cpu_torch|megatron\.core\.optimizer",
        "megatron.core.optimizer.optimizer._zero_grad_group_helper asks every shard for its gradient",
    ),
    KnownWarning(
        r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
        FutureWarning,
        r"torch\.distributed",
        "Megatron-core's names for these",
    ),
    KnownWarning(
        r"'pin_memory' argument is set as true but no accelerator is found",
        UserWarning,
        r"torch\.utils\.data",
        "NeMo-Aligner always asks for pinned memory",
    ),
    KnownWarning(
        r"The `srun` command is available on your system but is not used",
        UserWarning,
        r"lightning\.fabric\.plugins\.environments\.slurm",
        "the processes are torchrun's",
    ),
    KnownWarning(
        r"The lr scheduler dict contains the key\(s\) \['monitor', 'reduce_on_plateau'\]",
        UserWarning,
        r"lightning\.pytorch\.core\.optimizer",
        "NeMo-Aligner steps the scheduler by hand",
    ),
)

RECORDS: tuple[KnownRecord, ...] = (
    KnownRecord("NeMo", r"Cannot import zarr", "zarr checkpoints are an older format, never written here"),
    KnownRecord(
        "nemo.collections.llm.gpt.model.megatron.hyena.hyena_mixer",
        r"WARNING: transformer_engine not installed",
        "Hyena models are imported with the others",
    ),
    KnownRecord(
        "nemo_logger",
        r"The model: .* does not have field\.name: ",
        "NeMo 1 says so of each of the fifty newer fields of Megatron's configuration",
    ),
    KnownRecord(
        "nemo_logger",
        r"`<class '[\w.]*MegatronPretrainingRandomBatchSampler'>` is experimental",
        "NeMo-Aligner's sampler of every training",
    ),
    KnownRecord(
        "megatron.core.optimizer.distrib_optimizer",
        r"DistributedOptimizer\.sharded_state_dict parameter `sharding_type` is deprecated",
        "NeMo's way to call it",
    ),
    KnownRecord("megatron.core.rerun_state_machine", r"Implicit initialization of Rerun State Machine", "it is unused"),
    KnownRecord(
        "megatron.core.rerun_state_machine",
        r"RerunStateMachine initialized in mode RerunMode\.DISABLED",
        "it is unused",
    ),
)

#: Loggers that set their level to INFO while they are imported.
CHATTY = (
    "nemo_logger",
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.distributed",
    "pytorch_lightning.utilities.rank_zero",
)


class _Known(logging.Filter):
    """Stops known records of one logger, and its INFO lines where it is chatty."""

    def __init__(self, logger: str) -> None:
        super().__init__()
        self.patterns = [re.compile(record.message) for record in RECORDS if record.logger == logger]
        self.floor = logging.WARNING if logger in CHATTY else logging.NOTSET

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            return True
        if record.levelno < self.floor:
            return False
        text = record.getMessage()
        return not any(pattern.match(text) for pattern in self.patterns)


_entries: list[tuple[object, ...]] = []
_filters: dict[str, _Known] = {}


def quiet() -> None:
    """Drop the known messages from now on. Call it before the stack is imported. Idempotent."""
    if _filters:
        return
    for known in WARNINGS:
        warnings.filterwarnings("ignore", message=known.message, category=known.category, module=known.module)
        _entries.append(warnings.filters[0])  # type: ignore[arg-type]
    for name in dict.fromkeys([*(record.logger for record in RECORDS), *CHATTY]):
        _filters[name] = _Known(name)
        logging.getLogger(name).addFilter(_filters[name])


def loud() -> None:
    """Undo :func:`quiet`. Idempotent."""
    for entry in _entries:
        # pytest and catch_warnings put lists of their own in place, which may never have held it.
        if entry in warnings.filters:
            warnings.filters.remove(entry)  # type: ignore[attr-defined]
    _entries.clear()
    for name, known in _filters.items():
        logging.getLogger(name).removeFilter(known)
    _filters.clear()
