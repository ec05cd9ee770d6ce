"""The training loop that distillation, correction and recovery share: NeMo's trainer, our data, metrics,
checkpoints.
"""
