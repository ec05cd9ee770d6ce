"""Process start: launching, process groups, the CPU layer, plain Megatron models."""
