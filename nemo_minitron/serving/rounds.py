"""Several models in several engines, measured in turns, so that all of them see the same machine.

A round measures every model once. A figure is the median over the rounds with its lowest and highest value; a ratio is
the median of the rounds' ratios, not the ratio of medians, so what slows the machine for a while falls out of it.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_minitron.serving.engine import Options
from nemo_minitron.serving.process import EngineProcess, Memory

__all__ = ["Load", "Measured", "Subject", "measure", "ratios", "spread"]


@dataclass(frozen=True)
class Load:
    """What is asked of each model.

    Attributes:
        batch_size: sequences at once.
        prompt_tokens: of each; drawn at random from the ids that all models have.
        new_tokens: after the first one.
        repeats: rounds, after one that is dropped.
        seed: of the prompts.
        together: all models stay in memory.
    """

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    seed: int = 1234
    together: bool = True


@dataclass(frozen=True)
class Subject:
    """A model in an engine.

    Attributes:
        model: its name.
        engine: the engine's.
        path: what the engine loads.
        losses: whether its loss is computed.
    """

    model: str
    engine: str
    path: str
    losses: bool = False


@dataclass
class Measured:
    """What was measured of a subject, an entry for each round.

    Attributes:
        subject: the model in its engine.
        facts: of the engine, see :meth:`~nemo_minitron.serving.process.EngineProcess.wait`.
        memory: of the process at its end; with ``together`` off, the largest of them.
        first_token: seconds until the first token of a single prompt.
        prefill: prompt tokens a second, of the batch.
        decode: new tokens a second, of the batch.
        block_losses: of each block, in nats a token.
    """

    subject: Subject
    facts: dict[str, Any] = field(default_factory=dict)
    memory: Memory = field(default_factory=lambda: Memory(0, 0, 0))
    first_token: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    block_losses: list[float] = field(default_factory=list)


def measure(
    subjects: Sequence[Subject],
    load: Load,
    options: Options,
    *,
    logs: Path,
    blocks: Callable[[int], Sequence[Sequence[int]]] | None = None,
    progress: Callable[[int, str], None] | None = None,
) -> list[Measured]:
    """Measure subjects in turns.

    Args:
        subjects: at least one.
        load: what is asked of each.
        options: of the engines; ``context`` and ``batch_size`` follow from ``load``.
        logs: an existing directory for what the processes print.
        blocks: ``[n, s + 1]`` tokens for the losses, called with the ids that all models have.
        progress: called after each measurement with 1 and the subject's name.

    Returns:
        In the order of ``subjects``.

    Raises:
        MinitronError: for a model that an engine cannot load.
    """
    measured = [Measured(subject) for subject in subjects]
    length = load.prompt_tokens + load.new_tokens + 1
    options = replace(options, context=max(length, options.context), batch_size=load.batch_size)

    def process(number: int) -> EngineProcess:
        subject = subjects[number]
        return EngineProcess(subject.engine, subject.path, options, logs / f"{number}.log")

    with ExitStack() as stack:
        running: dict[int, EngineProcess] = {}

        @contextmanager
        def turn(number: int) -> Iterator[EngineProcess]:
            if load.together:
                yield running[number]
                return
            with process(number) as engine:
                measured[number].facts = engine.wait()
                yield engine
                measured[number].memory = _larger(measured[number].memory, engine.memory())

        if load.together:
            running = {number: stack.enter_context(process(number)) for number, _ in enumerate(subjects)}
            for number, engine in running.items():
                measured[number].facts = engine.wait()
        else:  # the first turn of each tells its vocabulary
            for number, _ in enumerate(subjects):
                with turn(number):
                    pass
        ids = min(result.facts["vocab_size"] for result in measured)
        prompts = _prompts(load, ids)
        for round_ in range(load.repeats + 1):
            for number, result in enumerate(measured):
                with turn(number) as engine:
                    if not load.together:  # what is dropped of a process that is new
                        engine.generate(prompts[:1], 1)
                    _time(engine, result, prompts, load.new_tokens, kept=round_ > 0)
                if progress is not None:
                    progress(1, f"{result.subject.model} in {result.subject.engine}")
        if blocks is not None and any(subject.losses for subject in subjects):
            tokens = blocks(ids)
            for number, result in enumerate(measured):
                if result.subject.losses:
                    with turn(number) as engine:
                        result.block_losses = engine.losses(tokens)
        for number, engine in running.items():
            measured[number].memory = engine.memory()
    return measured


def _time(engine: EngineProcess, result: Measured, prompts: list[list[int]], new_tokens: int, *, kept: bool) -> None:
    timing, _ = engine.generate(prompts, new_tokens)
    single = timing if len(prompts) == 1 else engine.generate(prompts[:1], 1)[0]
    if kept:
        result.first_token.append(single.first)
        result.prefill.append(len(prompts) * len(prompts[0]) / timing.first)
        result.decode.append(len(prompts) * new_tokens / timing.further)


def _prompts(load: Load, ids: int) -> list[list[int]]:
    draw = random.Random(load.seed)  # noqa: S311
    return [[draw.randrange(ids) for _ in range(load.prompt_tokens)] for _ in range(load.batch_size)]


def _larger(first: Memory, second: Memory) -> Memory:
    return Memory(*(max(pair) for pair in zip(vars(first).values(), vars(second).values(), strict=True)))


def spread(values: Sequence[float], digits: int = 6) -> dict[str, float]:
    """``{"median", "low", "high"}``."""
    figures = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: float(f"{value:.{digits}g}") for name, value in figures.items()}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """The spread of the ratios of each round, from lowest to highest."""
    return spread([mine / base for mine, base in zip(ours, theirs, strict=True)])
