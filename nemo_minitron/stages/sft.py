"""``minitron sft``: train a model on the answers of conversations, with NeMo-Aligner."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.config import SftConfig
from nemo_minitron.data.chat.conversations import CHAT_PACKAGES, Chat
from nemo_minitron.jobs.plans import StagePlan
from nemo_minitron.stages.shared.chats import align_plan, load_chats, shorter, tokens_of

if TYPE_CHECKING:
    from nemo_minitron.alignment.batches import Sample
    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.data.chat.templates import Template

__all__ = ["plan", "run"]


def plan(config: SftConfig) -> StagePlan:
    """What :func:`run` would read, write and cost."""
    return align_plan(config, CHAT_PACKAGES)


def run(config: SftConfig) -> dict[str, Any]:
    """Fine-tune. Every rank runs this; rank 0 writes the model.

    Returns:
        ``steps, samples, held_out, packed_rows, first_validation_loss, last_validation_loss, formats``.

    Raises:
        MinitronError: for data, a template, a model or a layout that do not fit each other, or a loss that is not
            finite.
    """
    import torch

    from nemo_minitron.checkpoints import open_checkpoint

    checkpoint = open_checkpoint(config.model)
    chats = load_chats(config.data)
    train, template = _samples(config, checkpoint, chats[0])
    held_out, _ = _samples(config, checkpoint, chats[1])

    from nemo_minitron.alignment.export import save_trained
    from nemo_minitron.alignment.sft import train_sft
    from nemo_minitron.runtime.files import read_json_lines

    output = Path(config.output)
    last = train_sft(
        checkpoint,
        train,
        held_out,
        layout=config.parallel,
        schedule=config,
        seed=config.runtime.seed,
        directory=output,
        max_length=config.data.max_length,
        resume=config.resume,
    )
    if torch.distributed.get_rank() != 0:
        return {}
    lines = read_json_lines(output / "metrics.jsonl")
    validations = [line["loss"] for line in lines if line.get("split") == "validation"]
    done = {
        "steps": max(line["step"] for line in lines),
        "samples": sum(len(sample.lengths) for sample in train),
        "held_out": sum(len(sample.lengths) for sample in held_out),
        "packed_rows": len(train) if config.pack else None,
    }
    formats = save_trained(
        checkpoint,
        last,
        output,
        template=template,
        lineage={"sft": {"model": config.model, "template": template.name, **done}},
        formats=config.formats,
        check=config.verify,
    )
    return {
        **done,
        "first_validation_loss": validations[0],
        "last_validation_loss": validations[-1],
        "formats": formats,
    }


def _samples(config: SftConfig, checkpoint: Checkpoint, chats: list[Chat]) -> tuple[list[Sample], Template]:
    encoded, template = tokens_of(chats, checkpoint, config.data)
    samples = [sample for _, (sample,) in encoded]
    lengths = [len(sample.ids) for sample in samples]
    samples = shorter(samples, lengths, [chat.where for chat, _ in encoded], config.data)
    if config.pack:
        from nemo_minitron.alignment.batches import pack

        samples = pack(samples, config.data.max_length)
    return samples, template
