"""The teacher of a training that reads its logits from a cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from nemo_minitron.config import LossConfig
from nemo_minitron.distillation.losses.common import CommonTokens
from nemo_minitron.distillation.losses.kernels import TopTokens
from nemo_minitron.distillation.losses.table import LOGIT_LOSSES
from nemo_minitron.distillation.teachers.documents import starts_of_positions
from nemo_minitron.distillation.teachers.logit_cache import (
    LogitCache,
    Manifest,
    Sample,
    decode_logits,
    decode_top,
    sample_keys,
)
from nemo_minitron.distillation.teachers.read_ahead import Pending, ReadAhead
from nemo_minitron.errors import ConfigError
from nemo_minitron.runtime.context import rank_part
from nemo_minitron.runtime.groups import Groups
from nemo_minitron.shape import padded_vocab

if TYPE_CHECKING:
    from nemo_minitron.distillation.losses.state_hooks import TeacherStates

__all__ = ["CachedTeacher", "cached_loss"]


def cached_loss(loss: LossConfig, manifest: Manifest) -> LossConfig:
    """The loss that is computed from a cache.

    A cache of the ``k`` likeliest tokens gives the losses ``from_top_k``. It also gives a loss that such a loss equals
    over the whole vocabulary ("forward_kl" for "top_k"), approximated from below with all ``k`` tokens. A cache of all
    log-probabilities gives every loss.

    Raises:
        ConfigError: for a loss that the cached tokens do not determine.
    """
    if manifest.k is None:
        return loss
    remedy = "write the cache with k=null, which keeps all log-probabilities, or use the teacher itself"
    faults = []
    entry = LOGIT_LOSSES[loss.kind]
    partial = entry if entry.from_top_k else next((e for e in LOGIT_LOSSES.values() if e.over_all == entry.name), None)
    if partial is None:
        faults.append(
            f"loss.kind={loss.kind}: needs the teacher's probability of every token, the cache has that of its "
            f"{manifest.k} likeliest; {remedy}"
        )
    if loss.temperature != manifest.temperature:
        faults.append(
            f"loss.temperature={loss.temperature}: the mass that the cache's {manifest.k} tokens leave over is known "
            f"at temperature {manifest.temperature:g} alone; {remedy}"
        )
    if "k" in entry.options and loss.k > manifest.k:
        faults.append(f"loss.k={loss.k}: the cache has {manifest.k} tokens; ask for no more, or {remedy}")
    if faults or partial is None:
        raise ConfigError(faults)
    return dataclasses.replace(loss, kind=partial.name, k=loss.k if "k" in entry.options else manifest.k)


class CachedTeacher:
    """Reads the samples of each micro-batch from a cache, in any order and under any layout.

    Every rank of the last stage reads the samples of its data-parallel replica, on a thread, while the student
    computes: those of a micro-batch are there when its loss asks for them. Memory: the encoded samples of five
    micro-batches at most; of a compact cache 8 bytes for each token that is kept.

    Args:
        cache: with the samples of the training.
        groups: the student's.
        loss: as :func:`cached_loss` gives it.
        student_rows: the student's vocabulary; None where it is as large as the teacher's.
        common: the tokens that the loss is over; None for the teacher's whole vocabulary.
    """

    states: TeacherStates | None = None

    def __init__(
        self,
        cache: LogitCache,
        groups: Groups,
        loss: LossConfig,
        *,
        student_rows: int | None = None,
        common: CommonTokens | None = None,
    ) -> None:
        self.cache, self.groups, self.loss = cache, groups, loss
        self._rows = cache.manifest.vocab_size if student_rows is None else student_rows
        whole = common is None or len(common) == cache.manifest.vocab_size
        self._common = None if whole else common
        self._device = groups.device.torch
        self._reads: ReadAhead[list[Sample]] = ReadAhead()

    def run(self, batches: Sequence[dict[str, torch.Tensor]]) -> list[Pending[list[Sample]]]:
        """Begin to read the samples.

        Args:
            batches: with ``tokens`` and ``position_ids`` ``[b, s]``, in the order of their losses.

        Returns:
            On the last pipeline stage for each micro-batch its samples, which :meth:`logits` waits for; elsewhere an
            empty list.
        """
        if not self.groups.is_last_stage:
            return []
        keys = [sample_keys(batch["tokens"], starts_of_positions(batch["position_ids"])) for batch in batches]
        return self._reads.begin([functools.partial(self._read, each) for each in keys])

    def _read(self, keys: Sequence[bytes]) -> list[Sample]:
        return [self.cache.read(key) for key in keys]

    def logits(self, kept: Pending[list[Sample]]) -> torch.Tensor | TopTokens:
        """Input of the loss: the likeliest tokens, or ``[s (/cp), b, V/tp]`` log-probabilities of the student's part.

        Raises:
            DataError: for a sample that is missing or damaged.
        """
        samples = kept.result()
        stacked = {name: torch.stack([sample[name] for sample in samples], 1) for name in samples[0]}
        return self._loss_input({name: rank_part(tensor, self.groups, dim=0) for name, tensor in stacked.items()})

    def _loss_input(self, kept: Sample) -> torch.Tensor | TopTokens:
        """Of a micro-batch's samples, stacked in the order of Megatron's logits."""
        if self.cache.manifest.k is not None:
            top = decode_top(kept, k=self.loss.k, common=self._common)
            return top.to(self._device)
        tensor = self.groups.layout.tensor
        columns = padded_vocab(self._rows, tensor=tensor) // tensor
        first = self.groups.tp_rank * columns
        whole = decode_logits(kept)
        local = whole.new_zeros(*whole.shape[:-1], columns)
        part = whole[..., first : first + columns]
        local[..., : part.shape[-1]] = part
        return local.to(self._device)

    def head(self, kept: Pending[list[Sample]]) -> None:
        """There is no output layer."""

    def close(self) -> None:
        """End the thread."""
        self._reads.close()
