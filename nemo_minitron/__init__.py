"""nemo_minitron: small, aligned language models out of large ones, the Minitron way, for NVIDIA NeMo."""

__version__ = "0.1.0"
