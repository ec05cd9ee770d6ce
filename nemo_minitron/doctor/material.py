"""The material of the checks: tiny random models whose sizes the layout divides, a tokenizer, tokens.

The weights are exact in bfloat16, so that a model in that precision has the same weights as the reference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron import axes
from nemo_minitron.architecture import Architecture
from nemo_minitron.runtime.versions import matches
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    import torch

    from nemo_minitron.checkpoints.base import Checkpoint
    from nemo_minitron.runtime.groups import ParallelLayout

__all__ = ["Material", "make_material", "shapes_for"]

VOCABULARY = 211  # no multiple of anything: every layout has rows of padding
SEED = 1234


@dataclass(frozen=True)
class Material:
    """The directory of the models, and the layout that they are made for.

    Attributes:
        folder: holds ``teacher`` and ``student``, Hugging Face directories.
        layout: the layout to be checked; the reference runs the same batches in a layout of one process.
    """

    folder: Path
    layout: ParallelLayout

    @property
    def teacher(self) -> Checkpoint:
        """The unpruned model, its embeddings untied."""
        return self._open("teacher")

    @property
    def student(self) -> Checkpoint:
        """A thinner model with tied embeddings, which the first and the last pipeline stage share."""
        return self._open("student")

    @property
    def pruned(self) -> ModelShape:
        """What the teacher is pruned to."""
        return shapes_for(self.layout)[1]

    @property
    def sequence_length(self) -> int:
        """Length of every block; it is split over context- and sequence-parallel ranks."""
        return math.lcm(32, 2 * self.layout.context * self.layout.tensor)

    @property
    def global_batch_size(self) -> int:
        """Sequences of an optimizer step: two micro-batches a pipeline stage on each data-parallel rank."""
        return 2 * self.layout.data * self.layout.pipeline

    def blocks(self, count: int, *, seed: int) -> torch.Tensor:
        """``[count, s + 1]`` random tokens."""
        import torch

        generator = torch.Generator().manual_seed(SEED + seed)
        return torch.randint(4, VOCABULARY, (count, self.sequence_length + 1), generator=generator)

    def _open(self, name: str) -> Checkpoint:
        from nemo_minitron.checkpoints import open_checkpoint

        return open_checkpoint(self.folder / name)


def shapes_for(layout: ParallelLayout) -> tuple[ModelShape, ModelShape]:
    """Shapes of a model and of the model pruned from it; the layout can split both."""
    tensor, stages = layout.tensor, layout.pipeline_stages
    width = max(1, 12 // tensor)
    whole = ModelShape(
        num_layers=max(4, 2 * stages),
        hidden_size=64,
        ffn_hidden_size=8 * width * tensor,
        num_attention_heads=4 * tensor,
        num_query_groups=2 * tensor,
        head_dim=16,
        vocab_size=VOCABULARY,
    )
    pruned = whole.replace(
        num_layers=whole.num_layers - (1 if matches("megatron-core>=0.13") else stages),  # uneven where they may be
        hidden_size=48,
        ffn_hidden_size=4 * width * tensor,
        num_attention_heads=tensor,
        num_query_groups=tensor,
    )
    return whole, pruned


def make_material(folder: Path, layout: ParallelLayout) -> Material:
    """Write the models into ``folder``, which must not exist. One process calls it."""
    folder.mkdir(parents=True)
    _write_tokenizer(folder / "tokenizer")
    whole, pruned = shapes_for(layout)
    student = pruned.replace(num_layers=max(2, layout.pipeline_stages), tied_embeddings=True)
    for name, shape, seed in (("teacher", whole, 0), ("student", student, 1)):
        _write_model(folder / name, shape, layout, tokenizer=folder / "tokenizer", seed=seed)
    return Material(folder, layout)


def _write_model(path: Path, shape: ModelShape, layout: ParallelLayout, *, tokenizer: Path, seed: int) -> None:
    import torch

    from nemo_minitron.checkpoints import Checkpoint, write_checkpoint

    architecture = Architecture(
        max_position_embeddings=4 * Material(path, layout).sequence_length,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    generator = torch.Generator().manual_seed(SEED + 100 + seed)
    tensors = {}
    for entry in axes.parameters(axes.family(architecture.family), shape):
        tensor = torch.randn(entry.shape, generator=generator)
        # Norms are around 1, and differ; what goes into a matrix keeps its size, and each layer matters.
        tensor = 1 + 0.2 * tensor if tensor.ndim == 1 else tensor * tensor.shape[-1] ** -0.5
        tensors[entry.name] = tensor.bfloat16().float()
    memory = Checkpoint(shape, architecture, _InMemory(tensors), tokenizer, path, "memory")
    write_checkpoint(memory, path, "hf", dtype="float32")


@dataclass(frozen=True)
class _InMemory:
    """Random weights in memory."""

    tensors: dict[str, torch.Tensor]

    def names(self) -> Sequence[str]:
        return list(self.tensors)

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def _write_tokenizer(folder: Path) -> None:
    """Write a word-level tokenizer: trainings need one beside a model. The tokens of the checks are random."""
    folder.mkdir()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = special + [f"w{index}" for index in range(VOCABULARY - len(special))]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": word, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False}
            for index, word in enumerate(special)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: index for index, word in enumerate(words)},
                  "unk_token": "<unk>"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
