"""Measure a model without some of its layers while one layer is in memory at a time.

A pass runs all candidates of a round side by side: between two layers there are hidden states for every different set
of layers that were left out so far. Every layer is read once for each round, however many candidates there are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nemo_minitron.data.blocks import Blocks
from nemo_minitron.importance.candidates import Candidate
from nemo_minitron.importance.depth_problem import DepthProblem, accuracy_of, name_of
from nemo_minitron.importance.depth_scores import DepthScores, Measurement
from nemo_minitron.runtime.journal import Journal
from nemo_minitron.runtime.progress import Advance
from nemo_minitron.streamed import Pass, States, StreamedModel, Trail

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from nemo_minitron.data.tasks import EncodedTask

__all__ = ["layer_importance_streamed"]

#: Hidden states of each set of samples, by the layers that were left out so far.
Branches = dict[Candidate, list[States]]


def layer_importance_streamed(
    model: StreamedModel,
    blocks: torch.Tensor | Blocks,
    *,
    micro_batch_size: int = 1,
    single: bool = True,
    block_lengths: Sequence[int] = (),
    greedy: int = 0,
    greedy_by: str = "loss",
    task: EncodedTask | None = None,
    task_name: str = "task",
    fingerprint: str | None = None,
    journal: Journal[tuple[Candidate, Measurement]] | None = None,
    budget: float = float("inf"),
    trail: Callable[[Sequence[Candidate]], Trail] | None = None,
    progress: Advance | None = None,
) -> DepthScores:
    """:func:`~nemo_minitron.importance.depth.layer_importance` of a model whose layers are in memory one at a time.

    Every rank calls it, and every rank gets all results, those of the live model. There is a pass for all single layers
    and blocks, and one for each greedy round.

    Args:
        model: to be measured; its layout has data parallelism alone.
        blocks, micro_batch_size, single, block_lengths, greedy, greedy_by, task, task_name, fingerprint, journal: as of
            ``layer_importance``. The journal gets the results of a pass at its end.
        budget: bytes of hidden states that a rank keeps in memory; more go to files in the trail's directory.
        trail: gives, for the candidates of a pass, what saves it between layers and says where a stopped one goes on;
            None keeps all in memory.
        progress: called with 1 for each layer of a pass, and with 1 for its losses.

    Raises:
        MinitronError: as of ``layer_importance``; the first layer whose output is not finite is named.
    """
    problem = DepthProblem(
        Blocks.of(blocks),
        model.shape,
        single=single,
        block_lengths=block_lengths,
        greedy=greedy,
        greedy_by=greedy_by,
        task=task,
        task_name=task_name,
        fingerprint=fingerprint,
    )

    def measure(candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Measurement]]:
        kept = None if trail is None else trail(candidates)
        branched = _BranchedPass(model, problem, candidates, micro_batch_size, budget, kept)
        results = branched.run(progress)
        yield from results
        if kept is not None:
            kept.close()

    return problem.solve(measure, device=model.groups.device.torch, journal=journal, progress=None)


class _BranchedPass:
    """A pass in which the hidden states branch where candidates differ.

    Args:
        model, micro_batch_size, budget: as of :func:`layer_importance_streamed`.
        problem: whose blocks and task run.
        candidates: of this pass.
        trail: of this pass.
    """

    def __init__(
        self,
        model: StreamedModel,
        problem: DepthProblem,
        candidates: Sequence[Candidate],
        micro_batch_size: int,
        budget: float,
        trail: Trail | None,
    ) -> None:
        self.model, self.problem, self.candidates, self.trail = model, problem, candidates, trail
        sets = [problem.blocks]
        if problem.task is not None:
            rows = zip(problem.task.tokens, problem.task.counted, strict=True)
            sets += [replace(Blocks.of(tokens), loss_mask=counted) for tokens, counted in rows]
        self._begun = None if trail is None else trail.find()
        # One set of states is in memory at any rate; the budget is for all branches together.
        self.passes = [Pass(model, part, micro_batch_size) for part in sets]
        self._size = sum(run.states.tensor.nbytes for run in self.passes)
        self._left = budget - self._size
        self._files = itertools.count()

    def run(self, progress: Advance | None) -> list[tuple[Candidate, Measurement]]:
        """Run all layers, and take the losses. Collective."""
        model, layers = self.model, self.model.shape.num_layers
        branches = self._start()
        if progress is not None and self._begun:
            progress(self._begun)
        for layer in range(self._begun or 0, layers):
            branches = self._through(layer, branches)
            if self.trail is not None:
                named = _named(branches)
                first = next(iter(named))
                # The first states have a file of their own; see Trail.
                self.trail.reach(layer + 1, _first(branches), {n: t for n, t in named.items() if n != first})
            if progress is not None:
                progress(1)
        model.release()
        chunk = model.output()
        results = [(layers_out, self._measured(chunk, layers_out, branches)) for layers_out in self.candidates]
        if progress is not None:
            progress(1)
        return results

    def _start(self) -> Branches:
        """The states that enter the first layer, or the one at which a stopped pass goes on."""
        keys = sorted({tuple(n for n in layers if n < (self._begun or 0)) for layers in self.candidates})
        branches: Branches = {keys[0]: [run.states for run in self.passes]}
        branches |= {key: self._more() for key in keys[1:]}
        if self._begun is None or self.trail is None:
            for run in self.passes:
                run.embed()
        else:
            named = _named(branches)
            first = next(iter(named))
            self.trail.load(_first(branches), {n: t for n, t in named.items() if n != first})
        return branches

    def _through(self, layer: int, branches: Branches) -> Branches:
        """The branches after a layer: each runs it, leaves it out, or does both."""
        chunk = self.model.layer(layer)
        wanted = {tuple(n for n in layers if n <= layer) for layers in self.candidates}
        after: Branches = {}
        for out, states in branches.items():
            runs, leaves = out in wanted, (*out, layer) in wanted
            if leaves:
                after[(*out, layer)] = self._copied(states) if runs else states
            if not runs:
                continue
            for run, own in zip(self.passes, states, strict=True):
                run.states = own
                run.through(chunk)
                run.check_finite(layer, where=f" without {name_of(out)}" if out else "")
            after[out] = states
        return dict(sorted(after.items()))

    def _measured(self, chunk: GPTModel, layers: Candidate, branches: Branches) -> Measurement:
        losses = []
        for run, own in zip(self.passes, branches[layers], strict=True):
            run.states = own
            losses.append(run.losses(chunk))
        task = self.problem.task
        if task is None:
            return self.problem.measurement(layers, losses[0], None)
        rows = [means * counted.sum(dim=1) for means, counted in zip(losses[1:], task.counted, strict=True)]
        return self.problem.measurement(layers, losses[0], accuracy_of(task, rows))

    def _copied(self, states: list[States]) -> list[States]:
        copies = self._more()
        for copy, own in zip(copies, states, strict=True):
            copy.tensor.copy_(own.tensor)
        return copies

    def _more(self) -> list[States]:
        """States for a further branch, in files where the budget is used up."""
        in_memory = self.trail is None or self._left >= self._size
        self._left -= self._size if in_memory else 0
        return [run.more_states(None if in_memory else self._file()) for run in self.passes]

    def _file(self) -> Path:
        assert self.trail is not None, "else all is in memory"
        return self.trail.directory / f"branch-{next(self._files)}.bin"


def _first(branches: Branches) -> States:
    return next(iter(branches.values()))[0]


def _named(branches: Branches) -> Mapping[str, torch.Tensor]:
    """The tensors of all branches, by layers left out and set of samples."""
    return {
        f"{'-'.join(map(str, out)) or 'whole'}/{number}": states.tensor
        for out, parts in branches.items()
        for number, states in enumerate(parts)
    }
