"""Reader of GGUF files, llama.cpp's format: header, tensors, tokenizer, and a table of architectures."""

from nemo_minitron.checkpoints.formats.gguf.checkpoint import convert_gguf, describe_gguf, is_gguf

__all__ = ["convert_gguf", "describe_gguf", "is_gguf"]
