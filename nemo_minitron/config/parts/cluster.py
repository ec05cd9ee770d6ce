"""The machines that a plan is for."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_minitron.config.parts.checks import choice, positive

__all__ = ["ClusterConfig", "GPUS"]

GPUS = ("a100", "h100", "h200", "b200")


@dataclass
class ClusterConfig:
    """GPUs of one kind in equal nodes.

    Attributes:
        gpu: kind of GPU: "a100", "h100", "h200" or "b200"; the settings below that are null are those of its DGX.
        gpus: number of GPUs; null takes as many as the planned layout has processes.
        gpus_per_node: GPUs of a node, joined by NVLink.
        memory_gib: memory of one GPU, in GiB.
        usable: share of the memory that a plan may fill; the rest is for libraries, buffers and fragmentation.
        teraflops: peak bf16 arithmetic of one GPU, without sparsity.
        link_gb_per_s: bandwidth of one GPU to others of its node, in one direction.
        network_gb_per_s: bandwidth of one GPU to other nodes, in one direction.
        mfu: share of the peak that arithmetic reaches while it runs (model FLOPs utilisation without any waiting).
        price: price of one GPU for an hour, in whatever currency; null leaves prices out.
    """

    gpu: str = "h100"
    gpus: int | None = None
    gpus_per_node: int = 8
    memory_gib: float | None = None
    usable: float = 0.9
    teraflops: float | None = None
    link_gb_per_s: float | None = None
    network_gb_per_s: float | None = None
    mfu: float = 0.4
    price: float | None = None

    def faults(self) -> list[str]:
        """Unknown kinds and ranges."""
        faults = [
            *choice(self, "gpu", GPUS),
            *positive(
                self, "gpus", "gpus_per_node", "memory_gib", "usable", "teraflops", "link_gb_per_s",
                "network_gb_per_s", "mfu", "price",
            ),
        ]  # fmt: skip
        faults += [f"{name}={getattr(self, name)}: is a share; give at most 1" for name in ("usable", "mfu")
                  if getattr(self, name) > 1]  # fmt: skip
        return faults
