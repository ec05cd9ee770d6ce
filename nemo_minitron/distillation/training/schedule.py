"""The hyper-parameters of a training. Imports nothing heavy: recipes are written where NeMo need not be."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """How long, how fast and how often.

    Attributes:
        steps: optimizer steps.
        micro_batch_size, global_batch_size: in sequences.
        lr, min_lr, warmup_steps: linear warm-up, then cosine to ``min_lr`` at ``steps``.
        weight_decay, beta1, beta2: AdamW.
        clip_grad: largest gradient norm; 0 does not clip.
        max_minutes: stop in good order, with a checkpoint, when they are over; None for no limit.
        validate_every, validation_batches: steps between validations; global batches of each.
        save_every: steps between checkpoints.
        log_every: steps between lines of metrics.
        precision: "32" or "bf16-mixed".
        recompute: activations that the backward pass computes again: "none", "selective" or "full".
        seed: of the order of repeated passes over the data.
        keep_best: also keep the weights of the validation with the lowest "kl" or "lm_loss"; None keeps none.
    """

    steps: int
    micro_batch_size: int
    global_batch_size: int
    lr: float
    min_lr: float
    warmup_steps: int
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_grad: float = 1.0
    max_minutes: float | None = None
    validate_every: int = 50
    validation_batches: int = 8
    save_every: int = 100
    log_every: int = 1
    precision: str = "32"
    recompute: str = "none"
    seed: int = 0
    keep_best: str | None = None
