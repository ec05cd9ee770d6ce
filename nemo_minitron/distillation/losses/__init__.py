"""Losses of distillation.

table                 an entry for each loss, by its name in the configuration
reference             losses of logits as the papers write them
kernels               the same, computed chunk by chunk
triton_kernels        the KLs among them on CUDA, by Triton
triton_choice         whether Triton or plain torch computes them
vocabulary_parallel   losses of logits that tensor parallelism has split
common                what two vocabularies share, and whose columns are where
states                losses of hidden states and attention relations
state_hooks           these losses on a live model, on any pipeline stage
layer_maps            which student layer learns from which teacher layer
balance               the weights between losses
"""
