"""What checking the checksums of a distributed checkpoint costs, against reading it without.

    python benchmarks/checksums.py [--quick]

A random Llama is written as a ``torch_dist`` checkpoint and read tensor by tensor, with the check and without it in
turn; once from the disk (its pages are dropped from the page cache before each reading, as far as the system does) and
once from the page cache. The times are medians, the costs ratios of two of them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from convert import FULL, QUICK, RandomWeights

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints import Checkpoint
from nemo_minitron.checkpoints.formats.torch_dist import reader
from nemo_minitron.checkpoints.formats.torch_dist.writer import write_torch_dist
from nemo_minitron.checkpoints.weights import names_and_shapes

_check = reader.damage


def drop_pages(directory: Path) -> None:
    """Ask the system to forget the files."""
    for file in directory.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read(directory: Path, source: Checkpoint, *, check: bool) -> float:
    """Seconds to read every tensor."""
    reader.damage = _check if check else lambda file, loaded=None: None
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
    arguments = parser.parse_args()
    shape, rounds = (QUICK, 7) if arguments.quick else (FULL, 11)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "weights"
        weights = RandomWeights(names_and_shapes(Architecture(), shape))
        source = Checkpoint(shape, Architecture(), weights, None, directory, "hf", {})
        write_torch_dist(source, directory, prefix="module.", dtype="bfloat16", vocab_rows=shape.vocab_size, common={})
        size = sum(file.stat().st_size for file in directory.iterdir())
        found: dict[str, float] = {"megabytes": size / 1e6, "cores": len(os.sched_getaffinity(0))}
        for place in ("disk", "cache"):
            times: dict[bool, list[float]] = {True: [], False: []}
            for number in range(2 * rounds):
                if place == "disk":
                    drop_pages(directory)
                check = bool(number % 2)
                times[check].append(read(directory, source, check=check))
            without, checked = (statistics.median(times[check]) for check in (False, True))
            found[f"{place}_seconds"] = without
            found[f"{place}_cost"] = checked / without - 1
            print(f"{place}: {size / 1e6 / without:,.0f} MB/s without the check, {checked / without - 1:+.1%} with it")
    print(json.dumps({name: round(value, 4) for name, value in found.items()}))


if __name__ == "__main__":
    main()
