"""Counting the bytes of tensors that are alive, at each operation of torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["StorageWatch"]


class StorageWatch(TorchDispatchMode):
    """While on, knows the most bytes that were held at once by the given tensors and all those made since.

    A storage counts once, however many views it has, and from the operation that makes it until nothing refers to it.

    Attributes:
        start: bytes of the tensors given.
        peak: the most bytes at any operation.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._held: dict[StorageWeakRef, int] = {}
        for tensor in tensors:
            self._add(tensor)
        self.start = self.peak = sum(self._held.values())

    def _add(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "meta":  # which holds nothing
            return
        storage = tensor.untyped_storage()
        self._held.setdefault(StorageWeakRef(storage), storage.nbytes())

    def alive(self) -> int:
        """Bytes held now."""
        self._held = {storage: size for storage, size in self._held.items() if not storage.expired()}
        return sum(self._held.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        self.peak = max(self.peak, self.alive())
        return result
