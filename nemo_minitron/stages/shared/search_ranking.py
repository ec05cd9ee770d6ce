"""The part of ``minitron search`` that runs candidates: losses, and latencies if asked for.

Each candidate is pruned from the checkpoint tensor by tensor, directly into a live model, and not written to disk. Rank
0 adds each result to the journal at once.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from nemo_minitron.config import SearchConfig, TargetConfig
from nemo_minitron.errors import NonFiniteError
from nemo_minitron.jobs.launch import job_folder
from nemo_minitron.parsing import parse_json
from nemo_minitron.runtime.journal import Journal
from nemo_minitron.runtime.progress import progress_bar
from nemo_minitron.search import Sizes, by_candidate, search_journal
from nemo_minitron.search.results import FINDINGS
from nemo_minitron.stages.shared.measuring import Measured, encoded_task, live_model, open_measured

if TYPE_CHECKING:
    from nemo_minitron.axes import KeptUnits
    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.data import Blocks
    from nemo_minitron.data.tasks import EncodedTask
    from nemo_minitron.runtime.groups import Groups

__all__ = ["BASE", "Work", "run"]

BASE = "unpruned"
"""The unpruned model's name in the journal."""
_FILE = "work.json"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """The work of one ranking.

    Attributes:
        candidates: the candidates to measure.
        distilled: distilled checkpoint of the single candidate, which is then measured instead.
        timed_only: measure only the latency.
        journal: file that the result of ``distilled`` is added to; None for the search's journal.
    """

    candidates: list[Sizes]
    distilled: str | None = None
    timed_only: bool = False
    journal: str | None = None

    @property
    def name(self) -> str:
        """Name of its log folder."""
        if self.distilled is not None:
            return f"distilled-{self.candidates[0].name}"
        return "latency" if self.timed_only else "ranking"

    def save(self, config: SearchConfig, folder: Path) -> None:
        """Write the work and the search's configuration to the folder that its ranks read."""
        settings = dataclasses.asdict(config)
        (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), "utf-8")
        (folder / _FILE).write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Work:
        """Read what :meth:`save` wrote."""
        content = parse_json((folder / _FILE).read_text())
        content["candidates"] = [Sizes(*sizes) for sizes in content["candidates"]]
        return cls(**content)


def run(config: SearchConfig) -> dict[str, Any]:
    """Measure the candidates in the job's folder. Every rank runs this; rank 0 writes the journal.

    Returns:
        ``candidates``: how many were measured.

    Raises:
        MinitronError: for a checkpoint, scores or text that cannot be used.
    """
    from nemo_minitron.checkpoints import open_checkpoint

    work = Work.load(job_folder())
    fitted = config.reconstruct_samples
    measured = open_measured(dataclasses.replace(config, samples=fitted + config.samples))
    checkpoint, groups, blocks = measured.checkpoint, measured.groups, measured.blocks[fitted:]
    # The leader has read and checked the journal; here it is only added to.
    journal = search_journal(config.output, {})
    task = None if config.task.given is None or work.timed_only else encoded_task(config, checkpoint)[1]
    if work.distilled is not None:
        values = _quality(config, open_checkpoint(work.distilled), blocks, groups, task)
        if groups.is_main:
            found = {f"distilled_{name}": values[name] for name in ("loss", "accuracy") if name in values}
            if work.journal is not None:
                journal = Journal(work.journal, {}, FINDINGS)
            journal.append([(work.candidates[0].name, found)])
        return {"candidates": 1}
    ranking = _Ranking(config, measured, journal, task, timed_only=work.timed_only)
    with progress_bar("ranking", len(work.candidates) + 1, shown=groups.is_main) as advance:
        ranking.measure(BASE, Sizes.of(checkpoint.shape))
        advance(1)
        for sizes in work.candidates:
            ranking.measure(sizes.name, sizes)
            advance(1, sizes.name)
    return {"candidates": len(work.candidates)}


class _Ranking:
    def __init__(
        self,
        config: SearchConfig,
        measured: Measured,
        journal: Journal[tuple[str, dict[str, Any]]],
        task: EncodedTask | None,
        *,
        timed_only: bool,
    ) -> None:
        import torch

        from nemo_minitron.search import Timer
        from nemo_minitron.stages.shared.choosing import read_scores

        checkpoint, groups = measured.checkpoint, measured.groups
        self.timed_only = timed_only
        self.timer: Timer | None = None
        if config.timed:
            self.timer = Timer(
                checkpoint.shape,
                checkpoint.architecture,
                groups,
                batch_size=config.budget.batch_size,
                sequence_length=config.budget.sequence_length,
                dtype=getattr(torch, config.runtime.dtype),
            )
        self.config, self.checkpoint, self.groups = config, checkpoint, groups
        count = config.reconstruct_samples
        self.fitted, self.blocks = measured.blocks[:count], measured.blocks[count:]
        self.journal, self.task = journal, task
        self.known = _lines(journal.path)
        self.choice = config.pruning("", TargetConfig())
        self.scores = read_scores(self.choice, checkpoint)

    def measure(self, name: str, sizes: Sizes) -> None:
        """Measure the loss of a candidate, and its latency if asked for, unless the journal has them."""
        from nemo_minitron.pruning import prune_weights
        from nemo_minitron.stages.shared.choosing import kept_units

        known = self.known.get(name, {})
        target = self.checkpoint.shape.replace(**sizes._asdict())
        values: dict[str, Any] = {}
        if "prefill" not in known and self.timer is not None:
            ours, unpruned = self.timer.measure(target)
            values |= {"prefill": ours.prefill, "decode": ours.decode}
            values |= {
                "prefill_ratio": ours.prefill / unpruned.prefill,
                "decode_ratio": ours.decode / unpruned.decode,
            }
        if "loss" not in known and not self.timed_only:
            pruned = self.checkpoint
            if target != self.checkpoint.shape:
                kept = kept_units(self.choice, self.checkpoint, target, self.scores)
                pruned = prune_weights(self.checkpoint, kept)
                if len(self.fitted):
                    pruned = self._refitted(pruned, kept)
            values |= _quality(self.config, pruned, self.blocks, self.groups, self.task)
        if values and self.groups.is_main:
            self.journal.append([(name, values)])
            if "loss" in values:
                accuracy = f", accuracy {values['accuracy']:.3f}" if "accuracy" in values else ""
                logger.info("%s: loss %.4f%s", name, values["loss"], accuracy)

    def _refitted(self, pruned: Checkpoint, kept: KeptUnits) -> Checkpoint:
        """A candidate whose matrices are refitted to the model; they are in memory."""
        import torch

        from nemo_minitron.reconstruction import TensorsReplaced, reconstruct
        from nemo_minitron.streamed import StreamedModel

        dtype = getattr(torch, self.config.runtime.dtype)
        tensors: dict[str, torch.Tensor] = {}
        reconstruct(
            StreamedModel(self.checkpoint, self.groups, dtype=dtype),
            StreamedModel(pruned, self.groups, dtype=dtype),
            kept,
            self.fitted,
            sink=lambda layer, changed, report: tensors.update(changed),
            micro_batch_size=self.config.micro_batch_size,
        )
        return dataclasses.replace(pruned, weights=TensorsReplaced(pruned.weights, tensors))


def _lines(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a checked journal; every rank reads it before rank 0 adds to it."""
    import torch.distributed as dist

    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    measured = by_candidate(FINDINGS.from_json(parse_json(line)) for line in lines)
    dist.barrier()
    return measured


def _quality(
    config: SearchConfig, checkpoint: Checkpoint, blocks: Blocks, groups: Groups, task: EncodedTask | None
) -> dict[str, Any]:
    """Load a checkpoint and measure its calibration loss, and its accuracy on the task.

    Raises:
        NonFiniteError: if the log-likelihood of an answer is NaN or infinite.
    """
    from nemo_minitron.evaluation import held_out_loss
    from nemo_minitron.importance import task_accuracy

    chunks = live_model(config, checkpoint, groups)
    mean = held_out_loss(
        chunks, groups, blocks, config.micro_batch_size, vocab_size=checkpoint.shape.vocab_size
    ).overall
    values = {"loss": mean.loss, "standard_error": mean.to_dict()["standard_error"]}
    if task is not None:
        accuracy = task_accuracy(chunks, groups, task, config.micro_batch_size, checkpoint.shape.vocab_size)
        if accuracy != accuracy:
            raise NonFiniteError(
                f"{checkpoint.path}: log-likelihoods of the task's answers are NaN or infinite; check the checkpoint's "
                "weights, or search in runtime.dtype=float32"
            )
        values["accuracy"] = accuracy
    del chunks
    gc.collect()  # Megatron's modules hold cycles: without this the next model stands beside this one.
    return values
