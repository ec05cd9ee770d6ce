"""The training loop that distillation, correction and recovery share: NeMo's trainer with this
suite's data, metrics and checkpoints.
"""
