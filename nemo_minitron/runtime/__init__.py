"""What a process needs before it computes: device, process groups, the CPU layer, plain Megatron models."""
