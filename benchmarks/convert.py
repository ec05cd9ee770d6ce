"""Peak memory of converting a checkpoint, against one layer + one embedding and against the model.

    python benchmarks/convert.py [--quick]

A random Llama is written tensor by tensor, then converted HF -> NeMo 2 -> .nemo -> HF, each direction in a process of
its own that has imported all it needs before it is measured. Two peaks are reported above what the process held before:

- ``peak``: the kernel's high-water mark of resident memory (``VmHWM``), which counts the pages of mapped input files;
- ``peak_private``: anonymous memory (``RssAnon``), sampled every millisecond: what the machine must really have.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from nemo_minitron import axes
from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints import Checkpoint, open_checkpoint, write_checkpoint
from nemo_minitron.checkpoints.weights import DTYPES, names_and_shapes
from nemo_minitron.shape import ModelShape

QUICK = ModelShape(12, 640, 1792, 10, 2, 64, 24000)
FULL = ModelShape(24, 2048, 5632, 32, 8, 64, 32000)
STEPS = (("hf", "nemo2"), ("nemo2", "nemo"), ("nemo", "hf"))
SUFFIX = {"hf": "", "nemo2": "", "nemo": ".nemo"}


@dataclasses.dataclass(frozen=True)
class RandomWeights:
    """Weights that are made up on reading."""

    shapes: dict[str, tuple[int, ...]]

    def names(self) -> Sequence[str]:
        return list(self.shapes)

    def tensor(self, name: str) -> torch.Tensor:
        return torch.randn(self.shapes[name]) * 0.02


def make_tokenizer(directory: Path, size: int) -> Path:
    """A word-level tokenizer of ``size`` tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(size)}
    raw = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0", eos_token="w1", bos_token="w2").save_pretrained(
        directory
    )
    return directory


def status(field: str) -> int:
    """Bytes of a field of ``/proc/self/status``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def convert(source: Path, target: Path, form: str) -> None:
    """One conversion, measured; prints JSON. Runs in a process of its own."""
    import nemo_minitron.checkpoints.formats.huggingface.checkpoint
    import nemo_minitron.checkpoints.formats.torch_dist.reader
    import nemo_minitron.checkpoints.formats.torch_dist.writer  # noqa: F401

    if form == "nemo2":
        import nemo.collections.llm.gpt.model.llama  # noqa: F401
        from nemo import lightning  # noqa: F401

    checkpoint = open_checkpoint(source)
    held = status("VmRSS"), status("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")  # restarts VmHWM
    private, done = [held[1]], threading.Event()

    def sample() -> None:
        while not done.wait(0.001):
            private[0] = max(private[0], status("RssAnon"))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    start = time.perf_counter()
    write_checkpoint(checkpoint, target, form)
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    figures = {"peak": status("VmHWM") - held[0], "peak_private": private[0] - held[1], "seconds": round(seconds, 2)}
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a model of 0.3 GB instead of 4.6 GB")
    parser.add_argument("--convert", nargs=3, metavar=("SOURCE", "TARGET", "FORMAT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.convert:
        source, target, form = arguments.convert
        convert(Path(source), Path(target), form)
        return
    shape, architecture = QUICK if arguments.quick else FULL, Architecture()
    shapes = names_and_shapes(architecture, shape)
    table, size = axes.family(architecture.family), DTYPES[architecture.dtype]
    layer = size * sum(torch.Size(axes.tensor_shape(row, shape)).numel() for row in table.layer.values())
    embedding = size * shape.vocab_size * shape.hidden_size
    result = {
        "benchmark": "convert",
        "layer": layer,
        "embedding": embedding,
        "bound": layer + embedding,
        "model": size * axes.parameter_count(table, shape),
        "directions": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        tokenizer = make_tokenizer(home / "tokenizer", shape.vocab_size)
        made = Checkpoint(shape, architecture, RandomWeights(shapes), tokenizer, home, "hf")
        write_checkpoint(made, home / "hf", "hf")
        for source, form in STEPS:
            target = home / f"{source}_{form}{SUFFIX[form]}"
            known = home / (
                "hf" if source == "hf" else f"{'hf' if source == 'nemo2' else 'nemo2'}_{source}{SUFFIX[source]}"
            )
            command = [sys.executable, __file__, "--convert", str(known), str(target), form]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            figures = json.loads(output.stdout.strip().splitlines()[-1])
            figures["peak_private_to_bound"] = round(figures["peak_private"] / result["bound"], 2)
            figures["peak_private_to_model"] = round(figures["peak_private"] / result["model"], 2)
            result["directions"][f"{source}->{form}"] = figures
            print(f"{source} -> {form}: {figures}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
