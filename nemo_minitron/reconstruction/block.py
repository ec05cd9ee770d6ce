"""Gradient steps on one layer alone, from the least-squares result on: block-wise local distillation.

Least squares solves for one matrix at a time, with all others fixed. Here all matrices, biases and norm scales of the
layer move together, towards the teacher's hidden states after the layer, on the inputs that the pruned model's own
earlier layers give. No other part of either model is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from nemo_minitron.config import HELD_OUT, BlockConfig
from nemo_minitron.reconstruction.parts import Layer
from nemo_minitron.streamed import States

__all__ = ["BlockReport", "BlockTraining"]

#: The held-out error is looked at so many times in the course of the steps.
_CHECKS = 4
_BETAS, _EPSILON = (0.9, 0.95), 1e-8


@dataclass(frozen=True)
class BlockReport:
    """What gradient steps made of a layer.

    Attributes:
        steps: after which the parameters were best on held-out samples; 0 where those of least squares stay.
        before, after: error of the hidden states after the layer on held-out calibration samples: the mean over the
            tokens of the square of the difference over the square of the teacher's state.
    """

    steps: int
    before: float
    after: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


class BlockTraining:
    """Train one layer of the pruned model by Adam, in float32; what does not help is taken back.

    A token's error counts relative to its own size in the residual stream: a step sees few samples, of which the tokens
    with massive activations (arXiv 2402.17762) would decide it otherwise. The size of a step is relative to the root
    mean square of each tensor, and falls linearly to zero. Samples are run one by one and their gradients are added in
    float64, so that any number of data-parallel ranks takes the same steps.

    Args:
        layer: of the pruned model, with its weights; the states of its pass are those that enter it. Its parameters are
            replaced.
        after: what it aims at: the teacher's hidden states before the next kept layer, in the kept channels.
        config: number, size and samples of the steps.
        seed: of the order of the samples; the number of the layer.
        dtype: of the pruned model's checkpoint, to which parameters are rounded before they are judged.

    Attributes:
        changed: the new tensors by name below the layer, in ``dtype``; empty where the layer stays.
    """

    def __init__(self, layer: Layer, after: States, config: BlockConfig, *, seed: int, dtype: torch.dtype) -> None:
        self.layer, self.after, self.config, self.seed = layer, after, config, seed
        self.run = layer.run
        self.groups = layer.run.model.groups
        self.dtype = dtype
        self.changed: dict[str, torch.Tensor] = {}

    def __call__(self) -> BlockReport:
        """Train the layer; it ends with the best parameters on held-out samples. Collective."""
        parameters = self.layer.parameters
        first = best = self._held_out_error()
        kept, reached = {name: value.detach().clone() for name, value in parameters.items()}, 0
        whole = {name: value.to(torch.float32, copy=True) for name, value in kept.items()}
        scales = {name: float(value.double().square().mean().sqrt()) for name, value in whole.items()}
        optimizer = torch.optim.Adam(
            [{"params": [whole[name]], "lr": self.config.learning_rate * (scales[name] or 1.0)} for name in whole],
            betas=_BETAS,
            eps=_EPSILON,
        )
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.config.steps)
        every = -(-self.config.steps // _CHECKS)
        for step, samples in enumerate(self._batches(), 1):
            gradients = self._gradients(samples)
            if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values()):
                break
            for name, value in whole.items():
                value.grad = gradients[name].float()
            optimizer.step()
            decay.step()
            for name, value in whole.items():
                parameters[name].data.copy_(value.to(self.dtype))
            if step % every == 0 or step == self.config.steps:
                error = self._held_out_error()
                if error < best:
                    best, reached = error, step
                    kept = {name: value.detach().clone() for name, value in parameters.items()}
        for name, value in parameters.items():
            dist.broadcast(kept[name], dist.get_global_rank(self.groups.dp, 0), group=self.groups.dp)
            value.data.copy_(kept[name])
        if reached:
            self.changed = {name: value.detach().to(self.dtype).cpu() for name, value in parameters.items()}
        return BlockReport(reached, first, best)

    def _batches(self) -> Iterator[list[int]]:
        """The samples of each step, by their numbers among all ranks': every one once, then all again."""
        count = torch.tensor(len(self.run.blocks), device=self.groups.device.torch)
        dist.all_reduce(count, group=self.groups.dp)
        numbers = torch.arange(int(count))
        numbers = numbers[numbers % HELD_OUT != HELD_OUT - 1]
        generator = torch.Generator().manual_seed(self.seed)
        waiting: list[int] = []
        for _ in range(self.config.steps):
            while len(waiting) < self.config.samples:
                waiting += numbers[torch.randperm(len(numbers), generator=generator)].tolist()
            yield waiting[: self.config.samples]
            del waiting[: self.config.samples]

    def _gradients(self, samples: list[int]) -> dict[str, torch.Tensor]:
        """Of the mean error of samples, float64, of all ranks together. Collective."""
        parameters = self.layer.parameters
        sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in parameters.items()}
        for number in samples:
            place, owner = divmod(number, self.groups.layout.data)
            if owner != self.groups.dp_rank:
                continue
            with torch.enable_grad():
                error = self._error(place) / (len(samples) * self.run.blocks.sequence_length)
                found = torch.autograd.grad(error, list(parameters.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), found, strict=True):
                if gradient is not None:  # an expert that no token of the sample reaches
                    total += gradient
        for total in sums.values():
            dist.all_reduce(total, group=self.groups.dp)
        return sums

    @torch.no_grad()
    def _held_out_error(self) -> float:
        """Collective."""
        data, rank = self.groups.layout.data, self.groups.dp_rank
        sums = torch.zeros(2, dtype=torch.float64, device=self.groups.device.torch)
        for place in range(len(self.run.blocks)):
            if (place * data + rank) % HELD_OUT == HELD_OUT - 1:
                sums[0] += self._error(place)
                sums[1] += self.run.blocks.sequence_length
        dist.all_reduce(sums, group=self.groups.dp)
        return float(sums[0] / sums[1])

    def _error(self, place: int) -> torch.Tensor:
        """Sum over a sample's tokens of the relative square of the difference, in float32 at least."""
        ours = self.layer.whole(self.run.batch(place, place + 1))
        ours = ours.to(torch.promote_types(ours.dtype, torch.float32))
        theirs = self.after.read(place, place + 1).to(ours)
        size = theirs.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        return ((ours - theirs).square().sum(-1) / size).sum()
