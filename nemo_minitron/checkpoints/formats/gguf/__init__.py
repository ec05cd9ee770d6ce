"""GGUF files, llama.cpp's format: header, tensors, tokenizer, and a table of architectures, read and written."""

from nemo_minitron.checkpoints.formats.gguf.checkpoint import convert_gguf, describe_gguf, is_gguf, open_gguf
from nemo_minitron.checkpoints.formats.gguf.export import export_gguf, exported_files
from nemo_minitron.checkpoints.formats.gguf.faults import gguf_faults
from nemo_minitron.checkpoints.formats.gguf.llama_cpp import gguf_logits, gguf_needs

__all__ = [
    "convert_gguf",
    "describe_gguf",
    "export_gguf",
    "exported_files",
    "gguf_faults",
    "gguf_logits",
    "gguf_needs",
    "is_gguf",
    "open_gguf",
]
