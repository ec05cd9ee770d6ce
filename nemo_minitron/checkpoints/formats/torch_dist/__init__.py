"""Megatron's ``torch_dist`` folders, read and written without starting Megatron."""
