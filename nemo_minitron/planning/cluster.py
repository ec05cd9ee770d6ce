"""Memory, arithmetic and bandwidths of a GPU in a cluster."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_minitron.config.parts import ClusterConfig, ParallelLayout

__all__ = ["Accelerator", "accelerator"]


@dataclass(frozen=True)
class Accelerator:
    """One GPU of a cluster.

    Attributes:
        memory: bytes.
        flops: peak bf16 operations a second, without sparsity.
        link: bytes a second to other GPUs of its node, in one direction.
        network: bytes a second to other nodes, in one direction.
    """

    memory: float
    flops: float
    link: float
    network: float

    def tensor_bandwidth(self, layout: ParallelLayout, gpus_per_node: int) -> float:
        """Bandwidth in the tensor-parallel group. Megatron numbers ranks by tensor, context, data, pipeline."""
        return self.link if layout.tensor <= gpus_per_node else self.network

    def context_bandwidth(self, layout: ParallelLayout, gpus_per_node: int) -> float:
        """Bandwidth in the context-parallel group."""
        return self.link if layout.tensor * layout.context <= gpus_per_node else self.network

    def data_bandwidth(self, layout: ParallelLayout, gpus_per_node: int) -> float:
        """Bandwidth in the data-parallel group."""
        return self.link if layout.tensor * layout.context * layout.data <= gpus_per_node else self.network

    def pipeline_bandwidth(self, layout: ParallelLayout, gpus_per_node: int) -> float:
        """Bandwidth between neighbouring pipeline stages."""
        return self.link if layout.world_size <= gpus_per_node else self.network


#: GiB that the driver reports, bf16 teraFLOP/s, NVLink and network in GB/s one way, by NVIDIA's data sheets of the GPUs
#: in their SXM form and of the DGX around them (one InfiniBand port a GPU: 200 Gb/s with A100, else 400 Gb/s).
_KNOWN = {
    "a100": (79.0, 312.0, 300.0, 25.0),
    "h100": (79.0, 989.0, 450.0, 50.0),
    "h200": (140.0, 989.0, 450.0, 50.0),
    "b200": (179.0, 2250.0, 900.0, 50.0),
}


def accelerator(config: ClusterConfig) -> Accelerator:
    """The GPU of a configuration."""
    memory, teraflops, link, network = _KNOWN[config.gpu]
    return Accelerator(
        memory=(config.memory_gib or memory) * 2**30,
        flops=(config.teraflops or teraflops) * 1e12,
        link=(config.link_gb_per_s or link) * 1e9,
        network=(config.network_gb_per_s or network) * 1e9,
    )
