"""Losses of distillation.

``table`` has an entry for each, by its name in the configuration; ``reference`` has them as the papers write them,
``kernels`` as they are computed chunk by chunk, ``vocabulary_parallel`` for logits that tensor parallelism has split;
``states`` those of hidden states, ``state_hooks`` where the states are taken on any pipeline stage, ``layer_maps``
which layer learns from which, ``balance`` the weights between losses.
"""
