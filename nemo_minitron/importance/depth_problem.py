"""What is measured of a model without some of its layers, in what order, and what results from the losses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from nemo_minitron.data.blocks import Blocks
from nemo_minitron.errors import ConfigError, DataError, NonFiniteError, ShapeError
from nemo_minitron.importance.candidates import Candidate, depth_faults, greedy_round, rounds
from nemo_minitron.importance.depth_scores import DepthScores, Measurement
from nemo_minitron.runtime.journal import Journal
from nemo_minitron.runtime.progress import Advance
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    from nemo_minitron.data.tasks import EncodedTask

__all__ = ["DepthProblem", "Measure", "accuracy_of", "name_of"]

#: Measures candidates in turn; gives each with its result as soon as it has it.
Measure = Callable[[Sequence[Candidate]], Iterator[tuple[Candidate, Measurement]]]


class DepthProblem:
    """The rounds of a measurement, whichever way the model runs.

    Args:
        blocks: ``[n, s + 1]`` calibration tokens.
        shape: of the model.
        single, block_lengths, greedy, greedy_by, task, task_name, fingerprint: as of
            :func:`~nemo_minitron.importance.depth.layer_importance`.

    Attributes:
        counted: ``[n, s]`` bool, labels that count; None if all do.

    Raises:
        MinitronError: as of ``layer_importance``, for what cannot be measured.
    """

    def __init__(
        self,
        blocks: Blocks,
        shape: ModelShape,
        *,
        single: bool,
        block_lengths: Sequence[int],
        greedy: int,
        greedy_by: str,
        task: EncodedTask | None,
        task_name: str,
        fingerprint: str | None,
    ) -> None:
        if len(blocks.shape) != 2 or len(blocks) == 0 or blocks.shape[1] < 2:
            raise DataError(
                f"calibration data is empty (blocks of shape {list(blocks.shape)}); give at least one block of two "
                "tokens"
            )
        blocks.check_labels("calibration data")
        if not single and not block_lengths and not greedy:
            raise ConfigError("nothing is to be measured; set single=true, block_lengths or greedy")
        if greedy_by not in ("loss", "task"):
            raise ConfigError(f"greedy_by={greedy_by!r}: must be loss or task")
        if greedy and greedy_by == "task" and task is None:
            raise ConfigError("greedy_by=task: there is no task; set task.path or task.builtin")
        if faults := depth_faults(shape.num_layers, block_lengths, greedy):
            raise ShapeError(faults)
        self.blocks, self.shape, self.task = blocks, shape, task
        self.counted = blocks.counted()
        weights = torch.ones(len(blocks)) if self.counted is None else self.counted.sum(dim=1)
        self._shares = weights.double() / weights.sum()
        self._single, self._block_lengths = single, block_lengths
        self._greedy, self._greedy_by = greedy, greedy_by
        self._task_name, self._fingerprint = task_name, fingerprint

    def measurement(self, layers: Candidate, losses: torch.Tensor, accuracy: float | None) -> Measurement:
        """The result for a candidate from the losses ``[n]`` of the blocks and, with a task, the accuracy.

        Raises:
            NonFiniteError: if one is NaN or infinite, naming the layers that were left out.
        """
        loss = float(losses.mean() if self.counted is None else (losses * self._shares).sum())
        if not bool(torch.isfinite(losses).all()) or (accuracy is not None and accuracy != accuracy):
            raise NonFiniteError(
                f"the loss {'of the whole model' if not layers else f'without {name_of(layers)}'} is NaN or infinite; "
                "check the checkpoint's weights, or measure in runtime.dtype=float32"
            )
        return Measurement(loss, accuracy)

    def solve(
        self,
        measure: Measure,
        *,
        device: torch.device,
        journal: Journal[tuple[Candidate, Measurement]] | None,
        progress: Advance | None,
    ) -> DepthScores:
        """Measure all candidates, round by round. Collective; every rank gets all results.

        Args:
            measure: called with the candidates of a round that are not measured yet.
            device: that the backend of the process group can send from.
            journal: takes each result as it comes, and gives those of an earlier process; used on global rank 0.
            progress: called with 1 for each result (those of the journal at once), the whole model's not counted.
        """
        here = journal is not None and dist.get_rank() == 0
        measured = _shared(dict(journal.read()) if journal is not None and here else {}, device)
        if progress is not None and (already := len(measured.keys() - {()})):
            progress(already)

        def run(candidates: Sequence[Candidate]) -> None:
            left = [layers for layers in candidates if layers not in measured]
            for layers, measurement in measure(left) if left else ():
                measured[layers] = measurement
                if journal is not None and here:
                    journal.append([(layers, measurement)])
                if progress is not None and layers:
                    progress(1, f"loss {measurement.loss:.3f} without {name_of(layers)}")

        def scores() -> DepthScores:
            return DepthScores(
                measured=dict(measured),
                shape=self.shape,
                samples=len(self.blocks),
                tokens=self.blocks.labels,
                task=None if self.task is None else self._task_name,
                questions=None if self.task is None else len(self.task.answers),
                fingerprint=self._fingerprint,
            )

        count = self.shape.num_layers
        known = rounds(count, single=self._single, block_lengths=self._block_lengths)
        run([layers for candidates in known for layers in candidates])
        chosen: Candidate = ()
        for _ in range(self._greedy):
            candidates = greedy_round(count, chosen)
            run(candidates)
            costs = scores().costs(self._greedy_by)
            # Of equal costs the higher layer goes, as in nemo_minitron.pruning.depth.
            chosen = min(candidates, key=lambda layers: (costs[layers], tuple(-layer for layer in layers)))
        return scores()


def accuracy_of(task: EncodedTask, rows: Sequence[torch.Tensor]) -> float:
    """Accuracy by the sums of the losses over the choices, of each bucket's rows; NaN if any is not finite."""
    likelihoods = -torch.cat(list(rows)) / task.characters
    if not bool(torch.isfinite(likelihoods).all()):
        return float("nan")
    table = torch.full((len(task.answers), int(task.choice.max()) + 1), -torch.inf, dtype=torch.float64)
    table[task.question, task.choice] = likelihoods
    return float((table.argmax(dim=1) == task.answers).double().mean())


def name_of(layers: Candidate) -> str:
    """``(3,)`` -> ``"layer 3"``, ``(3, 4, 5)`` -> ``"layers 3-5"``."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    run = list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"layers {layers[0]}-{layers[-1]}" if run else f"layers {', '.join(map(str, layers))}"


def _shared(measurements: dict[Candidate, Measurement], device: torch.device) -> dict[Candidate, Measurement]:
    """The measurements of global rank 0, on every rank."""
    text = json.dumps(
        [[layers, measurement.loss, measurement.accuracy] for layers, measurement in measurements.items()]
    ).encode()
    size = torch.tensor(len(text), device=device)
    dist.broadcast(size, src=0)
    data = torch.tensor(list(text.ljust(int(size))), dtype=torch.uint8)[: int(size)].to(device)
    dist.broadcast(data, src=0)
    rows = json.loads(bytes(data.cpu().tolist()))
    return {tuple(layers): Measurement(loss, accuracy) for layers, loss, accuracy in rows}
