"""An 8 B model on a small machine: scored, pruned, reconstructed, exported and verified, a layer at a time in memory.

    python benchmarks/large.py DIRECTORY [--small] [--dtype bfloat16] [--until STEP]

Writes a Hugging Face checkpoint in Llama-3.1-8B's shape with random weights (bfloat16, 15 GiB), and runs the commands
on it, each in a process of its own: ``minitron score`` on 2,048 tokens, ``prune`` to Minitron-4B-Width (arXiv
2408.11796: 4,512,746,496 parameters), ``reconstruct`` on the same tokens, ``export`` to Hugging Face with
``verify=true``. ``--small`` does the same with a model of a few megabytes. Weights are random, so that times and
memory are all that it measures. The directory must have 50 GB free; outputs that no later step reads are removed. A
run that was stopped goes on at its step. The last line is JSON: for each step

- ``seconds``, by the clock, and ``cpu_seconds`` of all its processes;
- ``memory_gib``: the most that the step's processes held at once beside files that they had mapped, and
  ``resident_gib``, the same with those; pages of mapped files are free for others at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

#: Llama-3.1-8B (arXiv 2407.21783, table 3).
LARGE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "vocab_size": 2000,
}
OTHER: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LENGTH, SAMPLES = 128, 16
GIB = 2**30


def write_teacher(directory: Path, sizes: dict[str, Any]) -> None:
    """A file of weights for each layer, so that a layer at a time is in memory."""
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(0)
    hidden, ffn, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    head = hidden // sizes["num_attention_heads"]
    groups = head * sizes["num_key_value_heads"]

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(std=columns**-0.5, generator=draw)

    def scale() -> torch.Tensor:
        return torch.empty(hidden, dtype=torch.bfloat16).normal_(1, 0.1, generator=draw)

    files: dict[str, str] = {}
    total = 0

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        save_file(tensors, directory / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())

    directory.mkdir(parents=True)
    for layer in range(sizes["num_hidden_layers"]):
        place = f"model.layers.{layer}."
        write(
            f"layer-{layer:02}.safetensors",
            {
                f"{place}self_attn.q_proj.weight": matrix(hidden, hidden),
                f"{place}self_attn.k_proj.weight": matrix(groups, hidden),
                f"{place}self_attn.v_proj.weight": matrix(groups, hidden),
                f"{place}self_attn.o_proj.weight": matrix(hidden, hidden),
                f"{place}mlp.gate_proj.weight": matrix(ffn, hidden),
                f"{place}mlp.up_proj.weight": matrix(ffn, hidden),
                f"{place}mlp.down_proj.weight": matrix(hidden, ffn),
                f"{place}input_layernorm.weight": scale(),
                f"{place}post_attention_layernorm.weight": scale(),
            },
        )
    write("embedding.safetensors", {"model.embed_tokens.weight": matrix(vocabulary, hidden)})
    write("output.safetensors", {"lm_head.weight": matrix(vocabulary, hidden), "model.norm.weight": scale()})
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tokenizer(directory, vocabulary)
    (directory / "config.json").write_text(json.dumps({**sizes, **OTHER}, indent=1))


def write_tokenizer(directory: Path, size: int) -> None:
    """A word for each token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", *(f"w{number}" for number in range(size - 3))]
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(directory)


def write_text(file: Path, vocabulary: int) -> None:
    """Documents of random words, many times what is asked for."""
    import random

    draw = random.Random(0)
    with file.open("w") as stream:
        for _ in range(40 * SAMPLES):
            words = " ".join(f"w{draw.randrange(vocabulary - 3)}" for _ in range(LENGTH))
            stream.write(json.dumps({"text": words}) + "\n")


@dataclass(frozen=True)
class Step:
    """A step of the run.

    Attributes:
        name: of the step.
        settings: of the command; None for the first, which writes the teacher.
        done_with: outputs that no later step reads.
    """

    name: str
    settings: dict[str, Any] | None = None
    done_with: tuple[str, ...] = ()


def steps(directory: Path, sizes: dict[str, Any], dtype: str) -> list[Step]:
    """What is run, in order."""

    def place(name: str) -> str:
        return str(directory / name)

    text = {
        "samples": SAMPLES,
        "micro_batch_size": 4,
        "runtime": {"device": "cpu", "dtype": dtype},
        "data": {
            "sequence_length": LENGTH,
            "sources": [{"name": "words", "path": place("text.jsonl")}],
            "cache_dir": place("cache"),
        },
    }
    target = {
        "hidden_size": sizes["hidden_size"] * 3 // 4,
        "ffn_hidden_size": sizes["intermediate_size"] * 9 // 14,
    }
    teacher, pruned, reconstructed = place("teacher"), place("pruned"), place("reconstructed")
    return [
        Step("teacher"),
        Step("score", {"model": teacher, "output": place("scores"), "memory": "streamed", **text}),
        Step("prune", {"model": teacher, "scores": place("scores"), "output": pruned, "target": target}),
        Step("reconstruct", {"model": pruned, "teacher": teacher, "output": reconstructed, **text}, ("pruned",)),
        Step(
            "export",
            {
                "model": reconstructed,
                "output": place("export"),
                "formats": ["hf"],
                "verify": True,
                "memory": "streamed",
                "runtime": {"device": "cpu"},
            },
        ),
    ]


def measured(command: list[str], log: Path) -> dict[str, float]:
    """Run a command; seconds and the peaks of the memory of its processes."""
    started, cpu = time.monotonic(), cpu_of_children()
    peaks = [0, 0]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
        try:
            while process.poll() is None:
                peaks = [max(pair) for pair in zip(peaks, memory_of(process.pid), strict=True)]
                time.sleep(0.1)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if process.returncode:
        lines = log.read_text(errors="replace").strip().splitlines()[-15:]
        raise SystemExit("\n".join([f"{' '.join(command)}: exit code {process.returncode}", *lines]))
    return {
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(cpu_of_children() - cpu, 1),
        "memory_gib": round(peaks[0] / GIB, 2),
        "resident_gib": round(peaks[1] / GIB, 2),
    }


def cpu_of_children() -> float:
    """Seconds of the processes that were started here and have ended, with those below them."""
    times = os.times()
    return times.children_user + times.children_system


def memory_of(root: int) -> tuple[int, int]:
    """Bytes that a process and its descendants hold: without mapped files, and with them."""
    parents: dict[int, int] = {}
    sizes: dict[int, tuple[int, int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            lines = (entry / "status").read_text().splitlines()
        except OSError:  # it has ended
            continue
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        if "VmRSS" in fields:
            parents[int(entry.name)] = int(fields["PPid"])
            anonymous, shared, resident = (
                int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem", "VmRSS")
            )
            sizes[int(entry.name)] = anonymous + shared, resident
    family = {root}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    held = [sizes[member] for member in family if member in sizes]
    return sum(size for size, _ in held), sum(size for _, size in held)


def run_step(step: Step, directory: Path, sizes: dict[str, Any]) -> dict[str, float]:
    """Run a step in a process of its own."""
    if step.settings is None:
        shutil.rmtree(directory / step.name, ignore_errors=True)
        command = [sys.executable, __file__, str(directory), "--write-teacher", json.dumps(sizes)]
    else:
        settings = directory / f"{step.name}.yaml"
        settings.write_text(json.dumps(step.settings, indent=1))  # JSON is YAML
        command = [str(Path(sys.executable).with_name("minitron")), step.name, str(settings), "overwrite=true"]
    result = measured(command, directory / f"{step.name}.log")
    for name in step.done_with:
        shutil.rmtree(directory / name, ignore_errors=True)
    return result


def parameters(directory: Path) -> int:
    """Of the exported model, by the headers of its files."""
    from safetensors import safe_open

    total = 0
    for file in sorted((directory / "export" / "hf").glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dictionary
                size = 1
                for length in tensors.get_slice(name).get_shape():
                    size *= length
                total += size
    return total


def main() -> None:
    """Run the steps that are not done, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="for everything; a stopped run there goes on")
    parser.add_argument("--small", action="store_true", help="a small model instead")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the passes")
    parser.add_argument("--until", help="last step to run")
    parser.add_argument("--write-teacher", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    directory: Path = arguments.directory
    if arguments.write_teacher:
        write_teacher(directory / "teacher", json.loads(arguments.write_teacher))
        return
    directory.mkdir(parents=True, exist_ok=True)
    sizes = SMALL if arguments.small else LARGE
    results = directory / "results.json"
    done: dict[str, Any] = json.loads(results.read_text()) if results.is_file() else {}
    if not (directory / "text.jsonl").is_file():
        write_text(directory / "text.jsonl", sizes["vocab_size"])
    show: Callable[[str, dict[str, Any]], None] = lambda name, values: print(  # noqa: E731
        f"{name:12} " + "  ".join(f"{key} {value}" for key, value in values.items()), flush=True
    )
    for step in steps(directory, sizes, arguments.dtype):
        if step.name not in done:
            done[step.name] = run_step(step, directory, sizes)
            results.write_text(json.dumps(done, indent=1))
        show(step.name, done[step.name])
        if step.name == arguments.until:
            break
    found = {"benchmark": "large", "dtype": arguments.dtype, "tokens": SAMPLES * LENGTH, "steps": done}
    if "export" in done:
        found["parameters"] = parameters(directory)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
