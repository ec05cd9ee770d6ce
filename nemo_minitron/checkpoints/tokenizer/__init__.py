"""Tokenizers: their files beside a checkpoint, comparison, and trimming to a smaller vocabulary."""
