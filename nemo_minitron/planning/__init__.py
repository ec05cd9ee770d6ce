"""What a training costs before it runs: memory, traffic, arithmetic, and which layout of a cluster is best.

Importing it imports no torch.
"""

from nemo_minitron.planning.memory import RECOMPUTE, MemoryCost, MemoryUse, Workload

__all__ = ["RECOMPUTE", "MemoryCost", "MemoryUse", "Workload"]
