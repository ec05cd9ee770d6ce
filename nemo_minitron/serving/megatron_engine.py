"""The live Megatron model, by the suite's own generation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from nemo_minitron import axes
from nemo_minitron.config import ParallelLayout, Sampling
from nemo_minitron.serving.engine import Options, Timing

__all__ = ["MegatronEngine"]


class MegatronEngine:
    """Any checkpoint that the suite opens, in one process."""

    name = "megatron"

    def __init__(self, path: Path, options: Options) -> None:
        from importlib.metadata import version

        from nemo_minitron.checkpoints import load_into, open_checkpoint
        from nemo_minitron.runtime import cpu
        from nemo_minitron.runtime.groups import initialize
        from nemo_minitron.runtime.model import build_model

        device = cpu.prepare(options.device)
        self.groups = initialize(ParallelLayout(), seed=options.seed)
        checkpoint = open_checkpoint(path)
        self.chunks = build_model(
            checkpoint.shape, checkpoint.architecture, self.groups, dtype=getattr(torch, options.dtype)
        )
        load_into(self.chunks, checkpoint, self.groups)
        self.version, self.device, self.weights = version("megatron-core"), device.type, options.dtype
        self.vocab_size, self.batch_size = checkpoint.shape.vocab_size, options.batch_size
        self.parameters = axes.parameter_count(checkpoint.family, checkpoint.shape)

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[Timing, list[list[int]]]:
        """See :class:`~nemo_minitron.serving.engine.Engine`."""
        from nemo_minitron.generation import generate_tokens

        moments: list[float] = []

        def note(_: list[int]) -> bool:  # of each row, after each token
            moments.append(time.perf_counter())
            return False

        began = time.perf_counter()
        answers = generate_tokens(
            self.chunks,
            self.groups,
            prompts,
            sampling=Sampling(max_new_tokens=1 + new_tokens, greedy=True),
            ends=(),
            vocab_size=self.vocab_size,
            batch_size=len(prompts),
            stop=note,
        )
        first, last = moments[len(prompts) - 1], moments[-1]
        return Timing(first - began, last - first), [answer.tokens for answer in answers]

    def losses(self, blocks: Sequence[Sequence[int]]) -> list[float]:
        """See :class:`~nemo_minitron.serving.engine.Engine`."""
        from nemo_minitron.runtime.forward import block_losses

        tokens = torch.tensor(blocks)
        means = block_losses(self.chunks, self.groups, tokens, self.batch_size, vocab_size=self.vocab_size)
        return [float(mean) for mean in means]
