"""How far a streamed pass has come, on disk, so that a later process goes on at the layer where it was."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_minitron.errors import CheckpointError
from nemo_minitron.runtime.files import replace_file
from nemo_minitron.runtime.groups import Groups
from nemo_minitron.streamed.states import States, save_tensors

__all__ = ["Trail"]

_RECORD = "pass.json"
#: Seconds between two saves of states that are in memory; those in a file are there already.
SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class _Stop:
    """A layer before which everything is on disk.

    Attributes:
        layer: the next to run.
        states: name of the file with the states that enter it.
        extra: name of the file with what the pass has gathered.
    """

    layer: int
    states: str
    extra: str


class Trail:
    """Saves the states of a pass between two layers. Every rank has files of its own, and all go on at one layer.

    The last two stops are kept until every rank has reached the last one: a kill may come between two ranks.

    Args:
        directory: made where it is missing; :meth:`close` removes it.
        subject: JSON values that the pass depends on (weights, tokens, settings); a directory with others is begun
            anew.
        groups: of this process; data parallelism alone.
        every: seconds between two saves of states in memory.
    """

    def __init__(
        self, directory: Path, subject: Mapping[str, Any], groups: Groups, *, every: float = SAVE_SECONDS
    ) -> None:
        self.root = directory
        self.directory = directory / f"rank-{groups.dp_rank}-of-{groups.layout.data}"
        self._subject = json.loads(json.dumps(subject, sort_keys=True, default=str))
        self._groups, self._every = groups, every
        self._stops: list[_Stop] = []
        self._last = time.monotonic()

    @property
    def spill(self) -> Path:
        """The file for this rank's states that memory does not hold."""
        return self.directory / "states.bin"

    def find(self) -> int | None:
        """The layer at which all ranks can go on; None to begin anew. Collective."""
        self._stops = self._read()
        here = max((stop.layer for stop in self._stops), default=-1)
        at = torch.tensor([here], device=self._groups.device.torch)
        dist.all_reduce(at, dist.ReduceOp.MIN, group=self._groups.dp)
        has = torch.tensor([int(any(stop.layer == int(at) for stop in self._stops))], device=at.device)
        dist.all_reduce(has, dist.ReduceOp.MIN, group=self._groups.dp)
        if not int(has):
            self._stops = []
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory.mkdir(parents=True)
            return None
        self._stops = [stop for stop in self._stops if stop.layer == int(at)]
        return int(at)

    def load(self, states: States, into: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Fill ``states`` from the stop that :meth:`find` returned, and return what the pass had gathered.

        Args:
            states: those that :meth:`reach` got.
            into: tensors that are filled with what was gathered under their names, which the result lacks.

        Raises:
            CheckpointError: if its files are damaged.
        """
        from safetensors import SafetensorError, safe_open

        (stop,) = self._stops
        into = into or {}
        found: dict[str, torch.Tensor] = {}
        try:
            with safe_open(self.directory / stop.states, "pt") as file:
                states.tensor.copy_(file.get_tensor("states"))
            with safe_open(self.directory / stop.extra, "pt") as file:
                names = set(file.keys())
                if lacking := into.keys() - names:
                    raise KeyError(min(lacking))
                for name in names:
                    if name in into:
                        into[name].copy_(file.get_tensor(name))
                    else:
                        found[name] = file.get_tensor(name).clone()  # no map of the file
            return found
        except (OSError, SafetensorError, RuntimeError, KeyError) as error:
            raise CheckpointError(
                f"{self.directory}: the states of a pass that was stopped cannot be read ({error}); remove {self.root} "
                "and start again"
            ) from error

    def reach(self, layer: int, states: States, extra: Mapping[str, torch.Tensor], *, force: bool = False) -> None:
        """Save, where it is time to, that ``layer`` is the next to run. Collective.

        Raises:
            OSError: if the disk is full.
        """
        due = torch.tensor([int(force or time.monotonic() - self._last >= self._every)])
        due = due.to(self._groups.device.torch)
        dist.all_reduce(due, dist.ReduceOp.MAX, group=self._groups.dp)
        if not int(due):
            return
        slot = "b" if self._stops and self._stops[-1].states.startswith("a") else "a"
        stop = _Stop(layer, f"{slot}-states.safetensors", f"{slot}-extra.safetensors")
        save_tensors(self.directory / stop.states, {"states": states.tensor})
        save_tensors(self.directory / stop.extra, extra)
        self._stops = [*self._stops[-1:], stop]
        content = {"subject": self._subject, "stops": [vars(each) for each in self._stops]}
        replace_file(self.directory / _RECORD, json.dumps(content) + "\n")
        dist.barrier(group=self._groups.dp)  # now no rank needs the stop before
        self._last = time.monotonic()

    def close(self) -> None:
        """Remove the directory, once the results are saved elsewhere. Collective."""
        dist.barrier(group=self._groups.dp)
        if self._groups.is_main:
            shutil.rmtree(self.root, ignore_errors=True)

    def _read(self) -> list[_Stop]:
        """The stops on this rank's disk; none where there are none, or of another pass."""
        try:
            content = json.loads((self.directory / _RECORD).read_text(encoding="utf-8"))
            stops = [_Stop(int(stop["layer"]), str(stop["states"]), str(stop["extra"])) for stop in content["stops"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return []
        same = content.get("subject") == self._subject
        return [stop for stop in stops if same and self._whole(stop)]

    def _whole(self, stop: _Stop) -> bool:
        return all((self.directory / name).is_file() for name in (stop.states, stop.extra))
