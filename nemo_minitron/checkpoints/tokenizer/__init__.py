"""Tokenizers: their files beside a checkpoint, and trimming to a smaller vocabulary."""
