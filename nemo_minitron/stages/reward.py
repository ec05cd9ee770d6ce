"""``minitron reward``: train a model that predicts the attribute values of answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.config import RewardConfig
from nemo_minitron.data.chat.conversations import CHAT_PACKAGES, Chat
from nemo_minitron.data.chat.preferences import PREFERENCE_PACKAGES
from nemo_minitron.jobs.plans import PlannedPath, StagePlan
from nemo_minitron.stages.shared.chats import align_plan, shorter, tokens_of

if TYPE_CHECKING:
    import torch

    from nemo_minitron.alignment.reward import ScoredSample
    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.data.chat.attributes import AttributeSchema
    from nemo_minitron.data.chat.templates import Template

__all__ = ["plan", "run"]


def plan(config: RewardConfig) -> StagePlan:
    """What :func:`run` would read, write and cost."""
    plan = align_plan(config, (*CHAT_PACKAGES, *PREFERENCE_PACKAGES))
    plan.writes = [
        PlannedPath(str(Path(config.output) / "model"), "decoder of the attribute model (NeMo 2)"),
        PlannedPath(str(Path(config.output) / "head.safetensors"), "its head"),
    ]
    if config.attributes.derive:
        plan.notes.append("labels of answers that carry none are derived by rules")
    return plan


def run(config: RewardConfig) -> dict[str, Any]:
    """Train. Every rank runs this; rank 0 writes the model.

    Returns:
        ``steps``, ``samples``, ``held_out``, ``derived``, the first and last validation ``loss``, and ``attributes``:
        for each attribute the held-out ``mse``, ``mse_of_mean`` (that of a constant prediction of the held-out mean)
        and ``correlation``; for pairs also ``pair_accuracy``, the share whose chosen answer has the higher predicted
        mean.

    Raises:
        MinitronError: for a model, data or a layout that do not fit each other, or a loss that is not finite.
    """
    import torch

    from nemo_minitron.alignment.attribute_model import AttributeScorer, load_attribute_model, save_attribute_model
    from nemo_minitron.alignment.export import save_trained
    from nemo_minitron.alignment.reward import read_head, train_reward
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.data.chat.labelled import labelled_chats, schema_of
    from nemo_minitron.runtime.files import read_json_lines
    from nemo_minitron.runtime.groups import current

    source = open_checkpoint(config.model)
    data = labelled_chats(config.data, config.attributes, pairs=config.pairs)
    # What no answer has a value of cannot be learnt: the model leaves it out.
    schema = schema_of(config.attributes).restricted({name for chat in data.train for name in chat.attributes})
    train, _, template = _samples(config, source, schema, data.train)
    held_out, numbers, _ = _samples(config, source, schema, data.held_out)
    layout = config.parallel
    output = Path(config.output)
    last = train_reward(
        source,
        train,
        held_out,
        schema=schema,
        layout=layout,
        schedule=config,
        seed=config.runtime.seed,
        directory=output,
        max_length=config.data.max_length,
        resume=config.resume,
    )
    groups = current(layout)
    if groups.is_main:
        made = {
            "attributes": list(schema.names),
            "derived": config.attributes.derive,
            "model": config.model,
            "data": config.data.path or config.data.package,
        }
        save_trained(source, last, output, template=template, lineage={"reward": made}, formats=[])
        weight, bias = read_head(last)
        save_attribute_model(
            output, schema, config.data.template, derived=config.attributes.derive, weight=weight, bias=bias
        )
    torch.distributed.barrier()
    scorer = AttributeScorer(load_attribute_model(output), groups)
    scores = scorer.scores([sample.ids for sample in held_out], micro_batch_size=config.micro_batch_size)
    if not groups.is_main:
        return {}
    lines = read_json_lines(output / "metrics.jsonl")
    validations = [line for line in lines if line.get("split") == "validation"]
    return {
        "steps": max((line["step"] for line in lines), default=0),
        "samples": len(train),
        "held_out": len(held_out),
        "derived": config.attributes.derive,
        "first_validation_loss": validations[0]["loss"] if validations else None,
        "last_validation_loss": validations[-1]["loss"] if validations else None,
        "attributes": _errors(scores, held_out, schema),
        **_pair_accuracy(scores, numbers, data.preferred),
    }


def _samples(
    config: RewardConfig, source: Checkpoint, schema: AttributeSchema, chats: list[Chat]
) -> tuple[list[ScoredSample], list[int], Template]:
    """The labelled conversations that are not too long, their indices in ``chats``, and their template."""
    from nemo_minitron.alignment.reward import ScoredSample

    done, template = tokens_of(list(enumerate(chats)), source, config.data, chats=lambda row: row[1:])
    encoded = [
        (ScoredSample.of(sample.ids, chat.attributes, schema), number, chat.where)
        for (number, chat), (sample,) in done
        if chat.attributes
    ]
    kept = shorter(encoded, [len(sample.ids) for sample, *_ in encoded], [where for *_, where in encoded], config.data)
    return [sample for sample, *_ in kept], [number for _, number, _ in kept], template


def _errors(
    scores: torch.Tensor, samples: list[ScoredSample], schema: AttributeSchema
) -> dict[str, dict[str, float | None]]:
    """Errors and correlation of the predictions, for each attribute with held-out values."""
    import torch

    from nemo_minitron.alignment.reward import NO_VALUE

    labels, errors = torch.tensor([sample.values for sample in samples]), {}
    for column, name in enumerate(schema.names):
        given = labels[:, column] != NO_VALUE
        if not given.any():
            continue
        wanted, got = labels[given, column].double(), scores[given, column].double()
        spread = bool(wanted.std(correction=0) > 0 and got.std(correction=0) > 0)
        errors[name] = {
            "mse": float((got - wanted).square().mean()),
            "mse_of_mean": float(wanted.var(correction=0)),
            "correlation": float(torch.corrcoef(torch.stack([wanted, got]))[0, 1]) if spread else None,
        }
    return errors


def _pair_accuracy(scores: torch.Tensor, numbers: list[int], preferred: list[bool | None]) -> dict[str, Any]:
    """The share of held-out pairs that the predictions order correctly; both answers must have been scored."""
    mean = dict(zip(numbers, scores.mean(dim=1).tolist(), strict=True))
    pairs = [number for number, chosen in enumerate(preferred) if chosen and {number, number + 1} <= mean.keys()]
    if not pairs:
        return {}
    right = sum(mean[number] > mean[number + 1] for number in pairs)
    return {"pairs": len(pairs), "pair_accuracy": right / len(pairs)}
