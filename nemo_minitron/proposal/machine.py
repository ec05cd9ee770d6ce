"""The machine, or the cluster, that a pipeline is for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nemo_minitron.config import ClusterConfig
from nemo_minitron.config.parts.cluster import GPUS
from nemo_minitron.doctor.facts import Facts, Gpu
from nemo_minitron.errors import ConfigError

__all__ = ["CORE_FLOPS", "Machine", "parse_cluster", "this_machine"]

#: Operations that a core of a processor does in a second of an fp32 training, by the demonstration on two cores. A
#: guess for any other processor; the limit in minutes holds whatever it is.
CORE_FLOPS = 4e10


@dataclass(frozen=True)
class Machine:
    """What trains.

    Attributes:
        title: for people.
        cluster: its GPUs; None where processors train.
        cores: of the processors.
        memory: free bytes of the host.
        here: this very machine.
    """

    title: str
    cluster: ClusterConfig | None
    cores: int = 1
    memory: float = 0.0
    here: bool = True

    @property
    def gpus(self) -> int:
        """Number of GPUs."""
        return 0 if self.cluster is None else self.cluster.gpus or 1


def parse_cluster(text: str) -> Machine:
    """A cluster as ``h100:16``: a kind of GPU that the planner knows, and how many; in nodes of eight.

    Raises:
        ConfigError: for another form, an unknown kind, no GPU.
    """
    match = re.fullmatch(r"([a-z][\w-]*)(?::(\d+))?", text.strip().lower())
    kind, count = (match[1], int(match[2] or 8)) if match else ("", 0)
    if kind not in GPUS:
        raise ConfigError(
            f"--cluster {text}: is no cluster that is known; give {', '.join(GPUS)} with a number: h100:16"
        )
    if count < 1 or (count > 8 and count % 8):
        raise ConfigError(f"--cluster {text}: give up to 8 GPUs, or whole nodes of 8")
    cluster = ClusterConfig(gpu=kind, gpus=count, gpus_per_node=min(8, count))
    return Machine(f"{count} x {kind.upper()}", cluster, here=False)


def this_machine(facts: Facts) -> Machine:
    """The machine of the facts: its GPUs, if it has any, else its processors."""
    cores = f"{facts.cores} core{'' if facts.cores == 1 else 's'}"
    if not facts.gpus:
        return Machine(
            f"this machine: {cores}, {facts.memory_free / 2**30:.0f} GiB free, no GPU", None, facts.cores,
            facts.memory_free,
        )  # fmt: skip
    count, gpu = len(facts.gpus), min(facts.gpus, key=lambda gpu: gpu.memory_bytes)
    cluster = ClusterConfig(
        gpu=_kind(gpu), gpus=count, gpus_per_node=count, memory_gib=round(gpu.memory_bytes / 2**30, 1)
    )
    title = f"this machine: {count} x {gpu.name} of {gpu.memory_bytes / 2**30:.0f} GiB"
    return Machine(title, cluster, facts.cores, facts.memory_free)


def _kind(gpu: Gpu) -> str:
    """The kind whose rates a GPU is planned with: its own, or those of the slowest."""
    return next((kind for kind in GPUS if kind in gpu.name.lower()), GPUS[0])
