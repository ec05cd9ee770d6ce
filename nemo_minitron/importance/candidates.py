"""The sets of layers that are left out in turn: single layers, runs, greedy rounds. Imports no torch, for plans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["Candidate", "blocks", "depth_faults", "diverge", "greedy_round", "layers_run", "rounds", "singles"]

#: Layers left out together, ascending; the empty one is the whole model.
Candidate = tuple[int, ...]


def singles(num_layers: int) -> list[Candidate]:
    """Every layer alone."""
    return [(layer,) for layer in range(num_layers)]


def blocks(num_layers: int, length: int) -> list[Candidate]:
    """Every run of ``length`` neighbouring layers."""
    return [tuple(range(first, first + length)) for first in range(num_layers - length + 1)]


def greedy_round(num_layers: int, chosen: Candidate) -> list[Candidate]:
    """``chosen`` with each further layer in turn."""
    return [tuple(sorted((*chosen, layer))) for layer in range(num_layers) if layer not in chosen]


def rounds(num_layers: int, *, single: bool, block_lengths: Sequence[int]) -> Iterator[list[Candidate]]:
    """The candidates that are known beforehand, in the order of their passes; the first leaves no layer out."""
    yield [()]
    if single:
        yield singles(num_layers)
    for length in sorted(set(block_lengths)):
        # Blocks of one layer are single layers.
        if length > 1 or not single:
            yield blocks(num_layers, length)


def diverge(one: Candidate, other: Candidate) -> int | None:
    """The first layer that only one of two candidates leaves out; their passes are the same before it."""
    return min(set(one) ^ set(other), default=None)


def layers_run(num_layers: int, candidates: Sequence[Candidate]) -> int:
    """Number of layers that run for these candidates in turn, if each reuses the common beginning of the one before."""
    total, begin = 0, 0
    for index, candidate in enumerate(candidates):
        total += num_layers - begin - sum(layer >= begin for layer in candidate)
        following = candidates[index + 1] if index + 1 < len(candidates) else candidate
        split = diverge(candidate, following)
        begin = split if split is not None and split >= begin else 0
    return total


def depth_faults(num_layers: int, block_lengths: Sequence[int], greedy: int) -> list[str]:
    """Why so many layers cannot be left out of ``num_layers``; empty if they can."""
    faults = [
        f"block_lengths: a block of {length} cannot be left out of {num_layers} layers; give 1 to {num_layers - 1}"
        for length in block_lengths
        if not 1 <= length < num_layers
    ]
    if not 0 <= greedy < num_layers:
        faults.append(f"greedy={greedy}: of {num_layers} layers at most {num_layers - 1} can be left out")
    return faults
