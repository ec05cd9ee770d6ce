"""A forward pass over many samples, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from nemo_minitron.data.blocks import Blocks
from nemo_minitron.errors import NonFiniteError
from nemo_minitron.runtime.forward import document_inputs, mean_losses
from nemo_minitron.runtime.masks import documents_masked
from nemo_minitron.streamed.model import StreamedModel
from nemo_minitron.streamed.states import States

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

__all__ = ["Pass", "Progress"]

#: Called with the number of micro-batches of a part that are done since its last call.
Progress = Callable[[int], None]


class Pass:
    """The hidden states of this rank's samples, and how a part of the model changes them.

    :meth:`embed` makes them, :meth:`through` runs a layer over them in place, :meth:`losses` reads them at the end.
    :meth:`embed` and :meth:`through` are not collective: data-parallel ranks run each at their own pace. Memory beyond
    the part of the model at hand: the states, and the activations of one micro-batch.

    Args:
        model: whose layers run.
        blocks: ``[n, s + 1]``, the same on every rank; data-parallel ranks share them out, every ``data``-th is this
            rank's. Where blocks say which documents they hold, attention stays within each.
        micro_batch_size: blocks that a layer takes at once.
        budget: bytes of states that this rank keeps in memory; larger ones are kept in ``file``.
        file: of states beyond the budget; None keeps all in memory.

    Attributes:
        states: between two layers.
        finite: every value that a layer gave so far is finite.
    """

    def __init__(
        self,
        model: StreamedModel,
        blocks: Blocks,
        micro_batch_size: int = 1,
        *,
        budget: float = float("inf"),
        file: Path | None = None,
    ) -> None:
        groups = model.groups
        self.model, self.micro_batch_size = model, micro_batch_size
        self.blocks = blocks[groups.dp_rank :: groups.layout.data]
        sizes = len(self.blocks), self.blocks.sequence_length, model.shape.hidden_size
        size = sizes[0] * sizes[1] * sizes[2] * model.dtype.itemsize
        self.states = States(*sizes, dtype=model.dtype, file=file if size > budget else None)
        self.finite = True

    def more_states(self, file: Path | None = None) -> States:
        """Further states of the same size, in memory or in a file; :attr:`states` may be set to them."""
        sizes = self.states.tensor.shape
        return States(*sizes, dtype=self.model.dtype, file=file)

    @property
    def micro_batches(self) -> int:
        """Number of them on this rank."""
        return -(-len(self.blocks) // self.micro_batch_size)

    @torch.no_grad()
    def embed(self) -> None:
        """Run the embedding: the states are those that enter the first layer."""
        chunk = self.model.embedding()
        for start, inputs, positions, mask in self.batches():
            self.states.write(start, chunk(inputs, positions, mask))

    @torch.no_grad()
    def through(
        self, chunk: GPTModel, *, around: AbstractContextManager[object] | None = None, progress: Progress | None = None
    ) -> None:
        """Run a layer: the states are those that leave it.

        Args:
            chunk: from :meth:`StreamedModel.layer`.
            around: entered for the passes, such as hooks.
            progress: see :data:`Progress`.
        """
        with around or nullcontext(), documents_masked([chunk], self.blocks.segments is not None):
            for start, inputs, positions, mask in self.batches():
                hidden = self.run(chunk, start, inputs, positions, mask)
                self.finite = self.finite and bool(torch.isfinite(hidden).all())
                self.states.write(start, hidden)
                if progress is not None:
                    progress(1)

    def check_finite(self, layer: int, *, where: str = "") -> None:
        """Stop if the layer that ran last gave a value that is NaN or infinite. Collective: every rank raises alike.

        Args:
            layer: its number (0-based).
            where: said behind it in the message.

        Raises:
            NonFiniteError: naming the layer.
        """
        broken = torch.tensor([int(not self.finite)], device=self.model.groups.device.torch)
        dist.all_reduce(broken, dist.ReduceOp.MAX, group=self.model.groups.dp)
        if int(broken):
            raise NonFiniteError(
                f"decoder.layers.{layer}: its output{where} is NaN or infinite; check the checkpoint's weights in and "
                "before that layer, or run it in runtime.dtype=float32"
            )

    def run(
        self,
        chunk: GPTModel,
        start: int,
        inputs: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """What a part that is not the embedding gives for the samples from ``start`` on."""
        hidden = self.states.read(start, start + len(inputs)).to(inputs.device)
        chunk.set_input_tensor(hidden)
        output: torch.Tensor = chunk(inputs, positions, mask)
        chunk.set_input_tensor(None)
        return output

    @torch.no_grad()
    def losses(self, chunk: GPTModel | None = None, *, progress: Progress | None = None) -> torch.Tensor:
        """Mean next-token cross-entropy of each block after the last layer, over the labels that count.

        Args:
            chunk: from :meth:`StreamedModel.output`; None reads it.
            progress: see :data:`Progress`.

        Returns:
            ``[n]`` float64 nats, of all blocks, on every rank and on the CPU. Collective.
        """
        groups, chunk = self.model.groups, self.model.output() if chunk is None else chunk
        device, layout = groups.device.torch, groups.layout
        counted = self.blocks.counted()
        # As many on every rank, for the collective below.
        total = torch.tensor([len(self.blocks)], device=device)
        dist.all_reduce(total, group=groups.dp)
        mine = torch.zeros(-(-int(total) // layout.data), dtype=torch.float64)
        for start, inputs, positions, mask in self.batches():
            stop = start + len(inputs)
            labels = self.blocks.tokens[start:stop, 1:].to(device)
            counts = torch.ones_like(labels, dtype=torch.bool) if counted is None else counted[start:stop].to(device)
            logits = self.run(chunk, start, inputs, positions, mask)
            mine[start:stop] = mean_losses(
                logits, labels=labels, counted=counts, vocab_size=self.model.shape.vocab_size
            ).cpu()
            if progress is not None:
                progress(1)
        everyone = [torch.empty_like(mine, device=device) for _ in range(layout.data)]
        dist.all_gather(everyone, mine.to(device), group=groups.dp)
        return torch.stack(everyone, dim=1).flatten()[: int(total)].cpu()

    def batches(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """Of each micro-batch: its first sample, ``[b, s]`` inputs, their positions and their mask, on the device."""
        for start in range(0, len(self.blocks), self.micro_batch_size):
            yield self.batch(start, start + self.micro_batch_size)

    def batch(self, start: int, stop: int) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The samples ``start`` to ``stop``, as :meth:`batches` gives them."""
        segments = self.blocks.segments
        inputs = self.blocks.tokens[start:stop, :-1].to(self.model.groups.device.torch).contiguous()
        return start, inputs, *document_inputs(inputs, None if segments is None else segments[start:stop, :-1])
