"""``minitron dpo``: train a model to prefer chosen over rejected answers, with NeMo-Aligner; in one or more rounds."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.config import DpoConfig
from nemo_minitron.data.chat.preferences import PREFERENCE_PACKAGES, Preference
from nemo_minitron.jobs.plans import PlannedPath, StagePlan
from nemo_minitron.stages.shared.chats import align_plan, load_preferences, shorter, tokens_of

if TYPE_CHECKING:
    from nemo_minitron.alignment.pairs import Pair
    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.data.chat.templates import Template

__all__ = ["plan", "run"]

logger = logging.getLogger(__name__)


def plan(config: DpoConfig) -> StagePlan:
    """What :func:`run` would read, write and cost."""
    plan = align_plan(config, PREFERENCE_PACKAGES, copies=2, sequences=2, rounds=config.rounds)
    plan.reads += [PlannedPath(path, f"pairs of round {number}") for number, path in enumerate(config.rounds_data, 1)]
    if config.reference not in ("round", "first"):
        plan.reads.append(PlannedPath(config.reference, "reference policy"))
    plan.notes.append(f"loss {config.loss}, {config.rounds} round{'s' if config.rounds > 1 else ''}")
    return plan


def run(config: DpoConfig) -> dict[str, Any]:
    """Train in rounds. Every rank runs this; rank 0 writes the model.

    Round ``n`` writes its training state and metrics to ``round-n``; a resume does not repeat a finished round.

    Returns:
        ``pairs, held_out, rounds, formats``; for each round the statistics of the held-out pairs ``before`` and
        ``after`` it.

    Raises:
        MinitronError: for data, a template, a model or a layout that do not fit each other, or a loss that is not
            finite.
    """
    import torch

    from nemo_minitron.checkpoints import open_checkpoint

    if not config.resume:
        for old in Path(config.output).glob("round-*"):
            shutil.rmtree(old, ignore_errors=True)
    first = open_checkpoint(config.model)
    paths: list[str | None] = [*config.rounds_data] or [None]
    data = [_pairs(config, first, path) for path in paths]
    data = data * config.rounds if len(data) == 1 else data

    from nemo_minitron.alignment.dpo import STATISTICS, read_statistics, train_dpo
    from nemo_minitron.alignment.export import save_trained, trained_checkpoint
    from nemo_minitron.alignment.session import last_checkpoint

    output = Path(config.output)
    fixed = None
    if config.reference != "round":
        fixed = first if config.reference == "first" else open_checkpoint(config.reference)
    # Every rank looks before any of them trains. A round counts if those before it do.
    known = [read_statistics(output / f"round-{number}" / STATISTICS) for number in _rounds(config)]
    finished = [statistics if all(known[:number]) else None for number, statistics in enumerate(known, 1)]
    policy, last, rounds = first, Path(), []
    for number, done, (train, held_out, _) in zip(_rounds(config), finished, data, strict=True):
        directory = output / f"round-{number}"
        if done:
            last, statistics = last_checkpoint(directory), done
        else:
            last, statistics = train_dpo(
                policy,
                fixed or policy,
                train,
                held_out,
                config,
                layout=config.parallel,
                schedule=config,
                seed=config.runtime.seed,
                directory=directory,
                max_length=config.data.max_length,
                resume=config.resume,
                label=f"round {number} of {config.rounds}" if config.rounds > 1 else config.loss,
            )
        rounds.append(statistics)
        logger.info("round %d: %s", number, _told(statistics))
        policy = trained_checkpoint(first, last, tokenizer=first.tokenizer, lineage={})
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        summary = {
            "pairs": [len(train) for train, _, _ in data],
            "held_out": [len(held_out) for _, held_out, _ in data],
            "rounds": rounds,
        }
        formats = save_trained(
            first,
            last,
            output,
            template=data[0][2],
            lineage={"dpo": {"model": config.model, "template": data[0][2].name, "loss": config.loss, **summary}},
            formats=config.formats,
            check=config.verify,
        )
        return {**summary, "formats": formats}
    return {}


def _rounds(config: DpoConfig) -> range:
    return range(1, config.rounds + 1)


def _told(statistics: dict[str, dict[str, float]]) -> str:
    before, after = statistics["before"], statistics["after"]
    return (
        f"accuracy {before['accuracy']:.3f} -> {after['accuracy']:.3f}, margin {before['margin']:.3f} -> "
        f"{after['margin']:.3f} on {after['pairs']:.0f} held-out pairs"
    )


def _pairs(config: DpoConfig, checkpoint: Checkpoint, path: str | None) -> tuple[list[Pair], list[Pair], Template]:
    train, held_out = load_preferences(config.data, path)
    (train_pairs, template), (held_out_pairs, _) = (_tokenized(config, checkpoint, part) for part in (train, held_out))
    return train_pairs, held_out_pairs, template


def _tokenized(config: DpoConfig, checkpoint: Checkpoint, preferences: list[Preference]) -> tuple[list[Pair], Template]:
    from nemo_minitron.alignment.pairs import Pair

    encoded, template = tokens_of(preferences, checkpoint, config.data, chats=Preference.chats, last_answer_only=True)
    pairs = [
        Pair(
            good,
            bad,
            config.chosen_reward if preference.chosen_reward is None else preference.chosen_reward,
            config.rejected_reward if preference.rejected_reward is None else preference.rejected_reward,
        )
        for preference, (good, bad) in encoded
    ]
    lengths = [max(len(pair.chosen.ids), len(pair.rejected.ids)) for pair in pairs]
    return shorter(pairs, lengths, [preference.where for preference, _ in encoded], config.data), template
