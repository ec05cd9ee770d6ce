"""What scoring layer by layer costs beside the live model: time and memory, on a model with random weights.

    python benchmarks/streamed.py [--quick] [--turns N]

One process, one thread. A checkpoint in Llama's form is written, and scored by activations in turns: with the whole
model in memory, and layer by layer. Both begin at the checkpoint on disk. A ratio of times is that of the smallest CPU
times. Memory is measured apart, as the peak of what the process holds beside mapped files, above what it held before;
the pages of mapped files, which the tensors of a checkpoint are read from, are free for others at any time, and
``stream_resident_ratio`` has them too. The last line is JSON:

- ``stream_time_ratio``: of a streamed scoring to a live one, each with the loading of its weights;
- ``stream_pass_ratio``: of a streamed scoring, with the loading, to the live pass alone;
- ``stream_memory_ratio``: peak of a streamed scoring to two layers, the embedding and the hidden states;
- ``live_memory_ratio``: peak of a live scoring to the same, ``model_ratio`` of the whole model's weights;
- ``largest_difference`` of any score of the two, relative; scores must choose the same units.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from large import write_teacher
from prune import _LIBC, resident

from nemo_minitron import axes
from nemo_minitron.checkpoints import Checkpoint, load_into, open_checkpoint
from nemo_minitron.importance import Scores, score_criteria, score_streamed
from nemo_minitron.runtime import cpu
from nemo_minitron.runtime.groups import Groups, ParallelLayout, initialize
from nemo_minitron.runtime.model import build_model
from nemo_minitron.streamed import StreamedModel

SIZES: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 16000,
}
QUICK: dict[str, Any] = {**SIZES, "hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 6}
LENGTH, MICRO_BATCH = 128, 1
CRITERIA = [("mean", "l2")]


def live(checkpoint: Checkpoint, groups: Groups, blocks: torch.Tensor, spent: dict[str, float]) -> list[Scores]:
    """With the whole model in memory; ``spent`` gets the CPU seconds of the pass alone."""
    chunks = build_model(checkpoint.shape, checkpoint.architecture, groups)
    load_into(chunks, checkpoint, groups)
    started = time.process_time()
    scores = score_criteria(
        chunks, blocks, groups, criteria=CRITERIA, shape=checkpoint.shape, micro_batch_size=MICRO_BATCH
    )
    spent["pass"] = time.process_time() - started
    return scores


def streamed(checkpoint: Checkpoint, groups: Groups, blocks: torch.Tensor) -> list[Scores]:
    """Layer by layer."""
    return score_streamed(StreamedModel(checkpoint, groups), blocks, criteria=CRITERIA, micro_batch_size=MICRO_BATCH)


def anonymous() -> int:
    """Bytes that this process holds beside mapped files."""
    return resident("RssAnon") + resident("RssShmem")


def peaks(way: Callable[[], Any]) -> tuple[int, int]:
    """Most bytes above what was held before: beside mapped files, looked at each millisecond, and with them."""
    gc.collect()
    _LIBC.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # restarts VmHWM
    before, before_resident = anonymous(), resident("VmRSS")
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            most[0] = max(most[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        way()
    finally:
        done.set()
        watcher.join()
    return most[0] - before, resident("VmHWM") - before_resident


def measure(checkpoint: Checkpoint, groups: Groups, samples: int, turns: int) -> dict[str, Any]:
    """The figures of the module's docstring."""
    shape, table = checkpoint.shape, checkpoint.family
    draw = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, shape.vocab_size, (samples, LENGTH + 1), generator=draw)
    seconds: dict[str, list[float]] = {"live": [], "pass": [], "streamed": []}
    spent: dict[str, float] = {}
    results: dict[str, Scores] = {}
    for turn in range(turns + 1):  # the first is for what a process loads once
        for name in ("live", "streamed") if turn % 2 else ("streamed", "live"):
            gc.collect()
            started = time.process_time()
            if name == "live":
                (results[name],) = live(checkpoint, groups, blocks, spent)
            else:
                (results[name],) = streamed(checkpoint, groups, blocks)
            if turn:
                seconds[name].append(time.process_time() - started)
        if turn:
            seconds["pass"].append(spent["pass"])
    layer, whole = 4 * axes.layer_count(table, shape), 4 * axes.parameter_count(table, shape)
    allowed = 2 * layer + 4 * shape.hidden_size * (shape.vocab_size + samples * LENGTH)
    streamed_peak, streamed_resident = peaks(lambda: streamed(checkpoint, groups, blocks))
    live_peak, _ = peaks(lambda: live(checkpoint, groups, blocks, spent))
    turns_ratio = [one / other for one, other in zip(seconds["streamed"], seconds["live"], strict=True)]
    return {
        "tokens": samples * LENGTH,
        "parameters": whole // 4,
        "stream_time_ratio": round(min(seconds["streamed"]) / min(seconds["live"]), 3),
        "stream_time_ratio_median": round(statistics.median(turns_ratio), 3),
        "stream_pass_ratio": round(min(seconds["streamed"]) / min(seconds["pass"]), 3),
        "stream_memory_ratio": round(streamed_peak / allowed, 3),
        "stream_resident_ratio": round(streamed_resident / allowed, 3),
        "live_memory_ratio": round(live_peak / allowed, 3),
        "model_ratio": round(whole / allowed, 3),
        "allowed_mib": round(allowed / 2**20, 1),
        "live_seconds": round(min(seconds["live"]), 2),
        "largest_difference": difference(results["streamed"], results["live"]),
    }


def difference(one: Scores, other: Scores) -> float:
    """The largest, relative to the score; units must be in the same order."""
    largest = 0.0
    for name in ("ffn", "heads", "groups", "hidden", "layers"):
        ours, theirs = getattr(one, name), getattr(other, name)
        half = max(1, ours.shape[-1] // 2)
        if not torch.equal(ours.topk(half).indices, theirs.topk(half).indices):
            raise SystemExit(f"other units of {name} would be kept")
        largest = max(largest, float(((ours - theirs).abs() / theirs.abs()).max()))
    return largest


def main() -> None:
    """Write, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model, under 50 s")
    parser.add_argument("--turns", type=int, default=0, help="of each way")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cpu.prepare()
    groups = initialize(ParallelLayout())
    with tempfile.TemporaryDirectory() as scratch:
        write_teacher(Path(scratch) / "model", QUICK if arguments.quick else SIZES)
        checkpoint = open_checkpoint(Path(scratch) / "model")
        samples, turns = (8, 2) if arguments.quick else (16, 4)
        found = measure(checkpoint, groups, samples, arguments.turns or turns)
    for name, value in found.items():
        print(f"{name:32} {value}")
    print(json.dumps({"benchmark": "streamed", **found}))


if __name__ == "__main__":
    main()
