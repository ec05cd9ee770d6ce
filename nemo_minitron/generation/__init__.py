"""Text from a live Megatron model: sampling, key-value cache, any layout."""
