"""Tokenizers: their files beside a checkpoint, and their trimming to a smaller vocabulary."""
