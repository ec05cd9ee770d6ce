"""What checking the checksums of a distributed checkpoint costs, against reading it without.

    python benchmarks/checksums.py [--quick]

A random Llama is written as a ``torch_dist`` checkpoint and read tensor by tensor, with the check and without it in
turn; once from the disk (its pages are dropped from the page cache before each reading, as far as the system does) and
once from the page cache. A cost is the median of the ratios of two readings that follow each other, with its quartiles:
what else runs on the machine then falls on both. ``--zlib`` measures it without the package ``isal``. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import zlib
from pathlib import Path

import torch
from convert import FULL, QUICK, RandomWeights

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints import Checkpoint
from nemo_minitron.checkpoints.formats.torch_dist import checksums, reader
from nemo_minitron.checkpoints.formats.torch_dist.writer import write_torch_dist
from nemo_minitron.checkpoints.weights import names_and_shapes

_check, _window = reader.damage, reader.SummedWindow


def drop_pages(directory: Path) -> None:
    """Ask the system to forget the files."""
    for file in directory.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read(directory: Path, source: Checkpoint, *, check: bool) -> float:
    """Seconds to read every tensor."""
    reader.damage = _check if check else lambda file: None
    reader.SummedWindow = _window if check else reader.Window
    started = time.perf_counter()
    store = reader.TorchDist(directory)
    weights = reader.TorchDistWeights(store, source.shape, "llama", store.prefix("embedding.word_embeddings.weight"))
    for name in weights.names():
        weights.tensor(name)
    return time.perf_counter() - started


def main() -> None:
    """Write, read, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, in under 50 s")
    parser.add_argument("--zlib", action="store_true", help="sum by zlib, as where isal is not installed")
    arguments = parser.parse_args()
    shape, rounds = (QUICK, 25) if arguments.quick else (FULL, 9)
    if arguments.zlib:
        checksums.crc32 = zlib.crc32
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "weights"
        weights = RandomWeights(names_and_shapes(Architecture(), shape))
        source = Checkpoint(shape, Architecture(), weights, None, directory, "hf", {})
        write_torch_dist(source, directory, prefix="module.", dtype="bfloat16", vocab_rows=shape.vocab_size, common={})
        size = sum(file.stat().st_size for file in directory.iterdir())
        found: dict[str, float] = {"megabytes": size / 1e6, "cores": len(os.sched_getaffinity(0))}
        for place in ("disk", "cache"):
            ratios, times = [], []
            for number in range(rounds):
                pair = {}
                for check in (False, True) if number % 2 else (True, False):
                    if place == "disk":
                        drop_pages(directory)
                    pair[check] = read(directory, source, check=check)
                ratios.append(pair[True] / pair[False] - 1)
                times.append(pair[False])
            low, cost, high = statistics.quantiles(ratios, n=4)
            found[f"{place}_seconds"], found[f"{place}_cost"] = statistics.median(times), cost
            speed = size / 1e6 / statistics.median(times)
            print(f"{place}: {speed:,.0f} MB/s without the check, {cost:+.1%} with it ({low:+.1%} to {high:+.1%})")
    print(json.dumps({name: round(value, 4) for name, value in found.items()}))


if __name__ == "__main__":
    main()
