"""Tiny live Megatron models, their scores and kept units, for the tests of importance and pruning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nemo_minitron import axes
from nemo_minitron.architecture import Architecture
from nemo_minitron.axes import KeptUnits
from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.shape import ModelShape

SHAPE = ModelShape(
    num_layers=4,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=6,
    vocab_size=67,
)
ARCHITECTURE = Architecture(rotary_base=10000.0, max_position_embeddings=64)


@dataclasses.dataclass
class DictWeights:
    """Weights in memory."""

    tensors: dict[str, torch.Tensor]

    def names(self) -> Sequence[str]:
        return list(self.tensors)

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def random_checkpoint(
    shape: ModelShape = SHAPE,
    *,
    seed: int = 0,
    change: Callable[[dict[str, torch.Tensor]], None] | None = None,
    architecture: Architecture = ARCHITECTURE,
) -> Checkpoint:
    """A random model in memory; ``change`` may edit its tensors. Norm weights are random too, around 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for entry in axes.parameters(axes.family(architecture.family), shape):
        tensor = torch.randn(entry.shape, generator=generator)
        tensors[entry.name] = 1 + 0.2 * tensor if tensor.ndim == 1 else 0.3 * tensor
    if change is not None:
        change(tensors)
    return Checkpoint(shape, architecture, DictWeights(tensors), None, Path("random"), "memory")


def random_kept(shape: ModelShape, target: ModelShape, *, seed: int = 3, **options: Any) -> KeptUnits:
    from nemo_minitron.pruning import choose_units

    return choose_units(None, shape, target, method="random", seed=seed, **options)


def tokens(rows: int, length: int, *, seed: int = 5, vocab: int = SHAPE.vocab_size) -> torch.Tensor:
    """``[rows, length]`` random ids."""
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def live(checkpoint: Checkpoint, groups: Any, **options: Any) -> list[Any]:
    """This rank's chunks, filled."""
    from nemo_minitron.checkpoints import load_into
    from nemo_minitron.runtime.model import build_model

    chunks = build_model(checkpoint.shape, checkpoint.architecture, groups, **options)
    load_into(chunks, checkpoint, groups)
    return chunks


def logits(chunks: list[Any], ids: torch.Tensor) -> torch.Tensor:
    """``[b, s, V]`` of a one-process model."""
    (chunk,) = chunks
    with torch.no_grad():
        return chunk.eval()(ids, torch.arange(ids.shape[1]).expand_as(ids), None)


@contextmanager
def one_process() -> Iterator[Any]:
    """The CPU layer on, and groups of one."""
    from nemo_minitron.runtime import cpu
    from nemo_minitron.runtime.groups import ParallelLayout, destroy, initialize

    cpu.prepare()
    try:
        yield initialize(ParallelLayout())
    finally:
        destroy()
        cpu.deactivate()


def assert_greedy(chunks, groups, theirs, prompts, *, vocab: int) -> None:
    """Each token generated is the one that transformers' model chooses from the whole text, without a cache."""
    import pytest

    from nemo_minitron.config import Sampling
    from nemo_minitron.generation import generate_tokens

    sampling = Sampling(max_new_tokens=10, greedy=True)
    answers = generate_tokens(chunks, groups, prompts, sampling=sampling, ends=(), vocab_size=vocab)
    for prompt, answer in zip(prompts, answers, strict=True):
        text = list(prompt)
        for token, logprob in zip(answer.tokens, answer.logprobs, strict=True):
            with torch.no_grad():
                row = theirs(torch.tensor([text]), use_cache=False).logits[0, -1].log_softmax(-1)
            assert token == int(row.argmax())
            assert logprob == pytest.approx(float(row.max()), abs=1e-4)
            text.append(token)
