"""Token blocks as NeMo's data module: Megatron's samplers, exact position after a resume."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.lightning.data import WrappedDataLoader
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch.utils.data import Dataset

from nemo_minitron.data.blocks import Blocks
from nemo_minitron.errors import DataError
from nemo_minitron.runtime.masks import attention_mask, document_positions, documents_masked

__all__ = ["BlockDataModule", "BlockDataset", "DocumentMasks"]


class BlockDataset(Dataset[dict[str, torch.Tensor]]):
    """Token blocks as next-token samples, repeated to ``length`` samples.

    A sample is a dict of ``tokens``, ``labels``, ``loss_mask``, ``position_ids`` (``[s]``) and ``attention_mask``
    (``[1, s, s]`` bool, True where attention is not allowed, as Megatron's own attention takes it), and ``source``, the
    number of the block's domain. Where blocks hold
    several documents, attention and positions stay within each, and a label that begins another one does not count.
    Memory: masks are made sample by sample.

    Args:
        blocks: ``[n, s + 1]`` int64 tokens, or blocks that say which documents they hold and which labels count.
        length: samples in all; None takes each block once.
        seed: of the order of each further pass over the blocks.
        numbered: samples also have their own number, ``sample``.

    Raises:
        DataError: for no blocks, or a block in which no label counts.
    """

    def __init__(
        self, blocks: torch.Tensor | Blocks, length: int | None = None, *, seed: int = 0, numbered: bool = False
    ) -> None:
        if len(blocks) == 0:
            raise DataError("there is no token block to train on; give more text or shorter sequences")
        self.blocks = Blocks.of(blocks)
        self.blocks.check_labels("the training data")
        self.length = length or len(blocks)
        self.seed = seed
        self.numbered = numbered
        self._positions = torch.arange(self.blocks.sequence_length)
        self._mask = attention_mask(torch.zeros_like(self._positions))
        self._ones = torch.ones(self.blocks.sequence_length)
        self._order: tuple[int, torch.Tensor] = (0, torch.arange(len(blocks)))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        epoch, place = divmod(index, len(self.blocks))
        if epoch != self._order[0]:
            # The first pass keeps the order of the blocks, which are shuffled already.
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(len(self.blocks), generator=generator) if epoch else torch.arange(len(self.blocks))
            self._order = (epoch, order)
        block = self.blocks[int(self._order[1][place])]
        tokens, counted = block.tokens[0], block.counted()
        segments = None if block.segments is None else block.segments[0, :-1]
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": self._ones if counted is None else counted[0].float(),
            "position_ids": self._positions if segments is None else document_positions(segments),
            "attention_mask": self._mask if segments is None else attention_mask(segments),
            "source": block.domain[0],
            **({"sample": torch.tensor(index)} if self.numbered else {}),
        }


class BlockDataModule(pl.LightningDataModule):
    """Training and validation blocks for NeMo's trainer.

    Args:
        train, validation: ``[n, s + 1]`` token blocks, or blocks that say which documents they hold.
        steps: optimizer steps of the whole training.
        micro_batch_size, global_batch_size: in blocks.
        seed: of the order of repeated passes.
        numbered: training samples have their numbers (:class:`BlockDataset`).
    """

    def __init__(
        self,
        train: torch.Tensor | Blocks,
        validation: torch.Tensor | Blocks,
        *,
        steps: int,
        micro_batch_size: int,
        global_batch_size: int,
        seed: int = 0,
        numbered: bool = False,
    ) -> None:
        super().__init__()
        self.train = BlockDataset(train, steps * global_batch_size, seed=seed, numbered=numbered)
        self.validation = BlockDataset(validation)
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.seq_length = train.shape[1] - 1  # what NeMo's finetune looks at
        self.data_sampler = MegatronDataSampler(
            seq_len=self.seq_length,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            output_log=False,
        )

    def train_dataloader(self) -> WrappedDataLoader:
        """Batches follow Megatron's sampler, which starts after the samples already consumed."""
        return WrappedDataLoader(mode="train", dataset=self.train, num_workers=0)

    def val_dataloader(self) -> WrappedDataLoader:
        """The same blocks at every validation."""
        return WrappedDataLoader(mode="validation", dataset=self.validation, num_workers=0)

    def state_dict(self) -> dict[str, Any]:
        """Samples consumed when the checkpoint was made."""
        return {"consumed_samples": self.trainer.global_step * self.global_batch_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after those samples."""
        from megatron.core.num_microbatches_calculator import update_num_microbatches

        consumed = state_dict["consumed_samples"]
        self.data_sampler.init_consumed_samples = consumed
        self.data_sampler.prev_consumed_samples = consumed
        self.data_sampler.init_global_step = self.trainer.global_step
        update_num_microbatches(consumed_samples=consumed, consistency_check=False)


class DocumentMasks(pl.Callback):
    """Makes Transformer Engine's attention use the masks of the batches: :func:`~.masks.documents_masked`.

    It is active from the start of a training to its end, if the blocks hold several documents. Without Transformer
    Engine, attention uses the masks anyway.
    """

    def __init__(self, masked: bool) -> None:
        self.masked = masked
        self._stack = ExitStack()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All chunks of this rank are there by now."""
        chunks = list(trainer.strategy.megatron_parallel)
        self._stack.enter_context(documents_masked(chunks, self.masked))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the model as it was."""
        self._stack.close()
