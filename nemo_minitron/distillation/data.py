"""Token blocks as NeMo's data module: Megatron's samplers, exact position after a resume."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from nemo.lightning.data import WrappedDataLoader
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch.utils.data import Dataset

from nemo_minitron.errors import DataError

__all__ = ["BlockDataModule", "BlockDataset"]


class BlockDataset(Dataset[dict[str, torch.Tensor]]):
    """``[n, s + 1]`` token blocks as next-token samples, repeated to ``length`` samples.

    Args:
        blocks: int64 tokens.
        length: samples in all; None takes each block once.
        seed: of the order of each further pass over the blocks.
    """

    def __init__(self, blocks: torch.Tensor, length: int | None = None, *, seed: int = 0) -> None:
        if len(blocks) == 0:
            raise DataError("there is no token block to train on; give more text or shorter sequences")
        self.blocks = blocks
        self.length = length or len(blocks)
        self.seed = seed
        sequence = blocks.shape[1] - 1
        self._positions = torch.arange(sequence)
        # True where attention is not allowed, as Megatron's own attention takes it.
        self._mask = torch.ones(1, sequence, sequence, dtype=torch.bool).triu(diagonal=1)
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
        block = self.blocks[self._order[1][place]]
        return {
            "tokens": block[:-1],
            "labels": block[1:],
            "loss_mask": torch.ones(len(block) - 1),
            "position_ids": self._positions,
            "attention_mask": self._mask,
        }


class BlockDataModule(pl.LightningDataModule):
    """Training and validation blocks for NeMo's trainer.

    Args:
        train, validation: ``[n, s + 1]`` token blocks.
        steps: optimizer steps of the whole training.
        micro_batch_size, global_batch_size: in blocks.
        seed: of the order of repeated passes.
    """

    def __init__(
        self,
        train: torch.Tensor,
        validation: torch.Tensor,
        *,
        steps: int,
        micro_batch_size: int,
        global_batch_size: int,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.train = BlockDataset(train, steps * global_batch_size, seed=seed)
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
