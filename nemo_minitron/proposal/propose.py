"""From a model's path to the text of a pipeline that loads."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.config import DataConfig, StageConfig, load_pipeline
from nemo_minitron.proposal.chats import check_alignable, read_answers, read_pairs
from nemo_minitron.proposal.machine import Machine
from nemo_minitron.proposal.model import look_at
from nemo_minitron.proposal.plan import Plan, Request, align, make_plan
from nemo_minitron.proposal.shape import ask_budget
from nemo_minitron.proposal.stages import pipeline
from nemo_minitron.proposal.text import count_text, encoder_of, package_text, text_sources
from nemo_minitron.proposal.write import yaml_text
from nemo_minitron.shape import require_uniform

__all__ = ["Proposal", "propose"]

#: Inputs of a conversation that are proposed at most, on processors and on GPUs.
_LONGEST = (512, 4096)


@dataclass(frozen=True)
class Proposal:
    """A pipeline.

    Attributes:
        plan: the choices.
        text: of the file.
        stages: as the file's settings read.
    """

    plan: Plan
    text: str
    stages: list[StageConfig]


def propose(
    model: str,
    machine: Machine,
    request: Request,
    *,
    share: float | None = None,
    parameters: float | None = None,
    memory: float | None = None,
    text: Sequence[str] = (),
    text_key: str = "text",
    chat: str | None = None,
    pairs: str | None = None,
) -> Proposal:
    """A pipeline from import to report.

    Args:
        model: as ``minitron import`` takes it: a path, a name on the Hub that is in the cache, or a package.
        machine: what trains.
        request: further wishes.
        share, parameters, memory: the budget; at most one.
        text: files of text, as ``data.sources`` takes them; none for the text of packages.
        text_key: key or column of a record that holds the text.
        chat, pairs: files of conversations, and of preference pairs.

    Raises:
        MinitronError: for what cannot be read, and for a budget, a text or a machine that is too small.
    """
    with look_at(model, request.cache_dir) as subject:
        own, context = subject.model, subject.model.architecture.max_position_embeddings
        require_uniform(own.shape, "minitron init")
        budget = ask_budget(own, share=share, parameters=parameters, memory=memory, sequence_length=min(4096, context))
        for option, path in (("--chat", chat), ("--pairs", pairs)):
            if path is not None:
                check_alignable(own, option)
        data = DataConfig(cache_dir=request.cache_dir)
        sources = text_sources(text, text_key=text_key)
        counted = count_text(sources, encoder_of(subject.tokenizer), data) if sources else package_text()
        plan = make_plan(subject, machine, budget, counted, request, chat=chat is not None, pairs=pairs is not None)
        longest = min(context, _LONGEST[machine.cluster is not None])
        plan = align(
            plan,
            request,
            chat=None if chat is None else read_answers(chat, subject.tokenizer, longest=longest),
            pairs=None if pairs is None else read_pairs(pairs, subject.tokenizer, longest=longest),
        )
        content = yaml_text(*pipeline(plan, request))
    return Proposal(plan, content, _loaded(content))


def _loaded(content: str) -> list[StageConfig]:
    """The stages as ``minitron run`` would read them.

    Raises:
        ConfigError: for what a stage refuses, such as an environment variable in a path that is not set.
    """
    descriptor, name = tempfile.mkstemp(suffix=".yaml", prefix="proposal-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
        return load_pipeline(name)[1]
    finally:
        Path(name).unlink(missing_ok=True)
