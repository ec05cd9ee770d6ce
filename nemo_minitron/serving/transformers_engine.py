"""transformers, by its own ``generate``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.errors import CheckpointError
from nemo_minitron.serving.engine import Options, Timing

__all__ = ["TransformersEngine"]


class TransformersEngine:
    """A Hugging Face directory. Nothing is downloaded and none of its code runs.

    Raises:
        CheckpointError: if transformers cannot load it.
    """

    name = "transformers"

    def __init__(self, path: Path, options: Options) -> None:
        import transformers

        from nemo_minitron.checkpoints.formats.huggingface.loader import load_transformers
        from nemo_minitron.runtime.device import decide

        device = decide(options.device)
        try:
            model = load_transformers(path, getattr(torch, options.dtype))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: transformers cannot load it ({error})") from error
        self.model: Any = model.to(device.torch).eval()
        self.version, self.device, self.weights = transformers.__version__, device.type, options.dtype
        self.vocab_size = int(self.model.get_input_embeddings().weight.shape[0])
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[Timing, list[list[int]]]:
        """See :class:`~nemo_minitron.serving.engine.Engine`."""
        from transformers import GenerationConfig, StoppingCriteriaList

        ids = torch.tensor(prompts, device=self.model.device)
        clock = _Clock()
        settings = GenerationConfig(
            max_new_tokens=1 + new_tokens,
            do_sample=False,
            # None where the types of its layers keep transformers from having one (``load_transformers``).
            use_cache=self.model.config.use_cache,
            pad_token_id=0,
        )
        began = time.perf_counter()
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([clock]),
            # what a directory's own generation_config.json would add
            eos_token_id=None,
        )
        return Timing(clock.first - began, clock.last - clock.first), output[:, ids.shape[1] :].tolist()

    @torch.no_grad()
    def losses(self, blocks: Sequence[Sequence[int]]) -> list[float]:
        """See :class:`~nemo_minitron.serving.engine.Engine`."""
        losses = []
        for block in blocks:
            ids = torch.tensor([block], device=self.model.device)
            logits = self.model(ids[:, :-1]).logits[0].float()
            losses.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])))
        return losses


class _Clock:
    """A stopping criterion that never stops, and knows when it was asked."""

    def __init__(self) -> None:
        self.first = self.last = 0.0

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if ids.is_cuda:
            torch.cuda.synchronize()
        self.last = time.perf_counter()
        self.first = self.first or self.last
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
