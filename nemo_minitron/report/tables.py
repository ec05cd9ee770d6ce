"""The report's tables and headline figures, as plain values for the templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_minitron.report.run import Part, Run, StageRun, stage_of
from nemo_minitron.report.teachers import teacher_of
from nemo_minitron.shape import ModelShape

__all__ = [
    "Card",
    "Recovery",
    "Table",
    "cards",
    "count",
    "duration",
    "export_table",
    "generations",
    "loss_table",
    "main_recovery",
    "recoveries",
    "shape_table",
    "size",
    "stage_table",
    "step_boxes",
    "versions",
]


@dataclass(frozen=True)
class Table:
    """Rows of text below headings. The first column is the row's name.

    Attributes:
        roles: role of each row's model, for its colour; "" for none.
    """

    caption: str
    headings: list[str]
    rows: list[list[str]]
    roles: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Card:
    """A headline figure."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Recovery:
    """The share of pruning's loss increase that reconstruction, distillation or both recovered.

    Attributes:
        model, student, teacher: the model, the one that it was made of (of a distilled one whose student was
            reconstructed, the pruned one), and its teacher.
        share: ``(student - model) / (student - teacher)`` of the held-out losses.
        by: what was done: "reconstruction", "distillation" or "reconstruction and distillation".
    """

    model: str
    student: str
    teacher: str
    share: float
    by: str = "distillation"

    @property
    def trained(self) -> bool:
        """Whether the model was trained."""
        return "distillation" in self.by


def recoveries(run: Run, evaluation: dict[str, Any]) -> list[Recovery]:
    """For each reconstructed or distilled model whose student and teacher were evaluated too."""
    models = evaluation["models"]
    by_path = {Path(model["path"]).absolute(): name for name, model in models.items()}

    def evaluated(path: Any) -> str | None:
        return by_path.get(Path(path).absolute()) if isinstance(path, str) else None

    recoveries = []
    for name, model in models.items():
        origin = run.origins.get(name)
        if origin is None or origin.stage not in ("distill", "reconstruct"):
            continue
        if origin.stage == "reconstruct":
            by, teacher = "reconstruction", evaluated(origin.config.get("teacher"))
            student = evaluated(origin.config.get("model"))
        else:
            by, teacher = "distillation", evaluated(teacher_of(origin, run))
            student = evaluated(origin.config.get("student"))
            before = stage_of(str(origin.config.get("student")), run)
            if before is not None and before.stage == "reconstruct":
                pruned = evaluated(before.config.get("model"))
                if pruned is not None:
                    by, student = "reconstruction and distillation", pruned
        if student is None or teacher is None:
            continue
        gap = models[student]["loss"] - models[teacher]["loss"]
        if gap > 0:
            recoveries.append(Recovery(name, student, teacher, (models[student]["loss"] - model["loss"]) / gap, by))
    return recoveries


def main_recovery(run: Run, evaluations: Sequence[dict[str, Any]]) -> Recovery | None:
    """The first of a model that was trained; without one, the first."""
    found = [recovery for evaluation in evaluations for recovery in recoveries(run, evaluation)]
    return next((recovery for recovery in found if recovery.trained), found[0] if found else None)


def cards(run: Run) -> list[Card]:
    """The headline figures that the run has values for."""
    cards = []
    teacher, result = run.teacher, run.result
    if teacher is not None and result is not None:
        share = 1 - result.parameters / teacher.parameters
        cards.append(Card("parameters", count(result.parameters), f"of {count(teacher.parameters)}: {share:.0%} fewer"))
    evaluations = [evaluation for _, evaluation in run.evaluations]
    # First those that measured the run's own model.
    for evaluation in sorted(evaluations, key=lambda evaluation: _measured(run, evaluation) is None)[:1]:
        models = evaluation["models"]
        role_of = {run.roles.get(name, "other"): name for name in reversed(models)}
        best = _measured(run, evaluation) or next(
            (role_of[role] for role in ("distilled", "reconstructed", "pruned") if role in role_of), None
        )
        if best is not None:
            base = evaluation["baseline"]
            detail = f"{base}: {models[base]['loss']:.3f}" if base != best else "nats per token"
            cards.append(Card("held-out loss", f"{models[best]['loss']:.3f}", detail))
    for evaluation in evaluations:
        models = evaluation["models"]
        role_of = {run.roles.get(name, "other"): name for name in reversed(models)}
        if "pruned" in role_of and "random" in role_of:
            scored, drawn = models[role_of["pruned"]]["loss"], models[role_of["random"]]["loss"]
            cards.append(Card("scored pruning", f"{scored:.2f}", f"random pruning, same shape: {drawn:.2f}"))
            break
    recovery = main_recovery(run, evaluations)
    if recovery is not None:
        detail = f"by {recovery.by}, from {recovery.student} towards {recovery.teacher}"
        cards.append(Card("loss gap recovered", f"{recovery.share:.0%}", detail))
    untrained = [one for evaluation in evaluations for one in recoveries(run, evaluation) if not one.trained][:1]
    for one in untrained if recovery is not None and recovery.trained else []:
        cards.append(Card("of it before training", f"{one.share:.0%}", f"by {one.by}, from {one.student}"))
    cards.append(Card("time", duration(sum(stage.seconds for stage in run.stages)), f"{len(run.stages)} stages"))
    return cards


def _measured(run: Run, evaluation: dict[str, Any]) -> str | None:
    """The name under which an evaluation measured the run's model."""
    result = run.result
    stage = next((stage for stage in run.stages if result is not None and stage.name == result.name), None)
    names = [] if stage is None else run.measured(stage, evaluation)
    return names[0] if names else None


def shape_table(run: Run) -> Table | None:
    """Sizes of every checkpoint."""
    if not run.models:
        return None
    headings = ["model", "layers", "hidden", "FFN", "heads", "query groups", "head dim", "vocabulary", "parameters"]
    teacher = run.teacher
    rows = []
    for model in run.models:
        s = model.shape
        row = [model.name, f"{s.num_layers:,}", f"{s.hidden_size:,}", span(s, "ffn_hidden_size")]
        row += [f"{s.num_attention_heads:,}", span(s, "num_query_groups"), f"{s.head_dim:,}"]
        row += [f"{s.vocab_size:,}", f"{model.parameters:,}"]
        rows.append([*row, f"{model.parameters / teacher.parameters:.1%}"] if teacher else row)
    if teacher:
        headings.append(f"of {teacher.name}")
    tied = any(model.shape.tied_embeddings for model in run.models)
    caption = "Sizes of each model" + (" (embeddings tied: counted once)" if tied else "")
    return Table(caption, headings, rows, [model.role for model in run.models])


def span(shape: ModelShape, name: str, form: str = ",") -> str:
    """A size that may differ between layers: its value, or the range from the smallest to the largest."""
    sizes = sorted({getattr(layer, name) for layer in shape.each()})
    return " – ".join(format(size, form) for size in dict.fromkeys((sizes[0], sizes[-1])))


def loss_table(run: Run, evaluation: dict[str, Any]) -> Table:
    """Losses, overall and by domain."""
    models = evaluation["models"]
    domains = sorted({domain for model in models.values() for domain in model["domains"]})
    base = evaluation["baseline"]
    recovered = {recovery.model: recovery.share for recovery in recoveries(run, evaluation)}
    headings = ["model", "loss", "± s.e.", "perplexity", f"over {base}"]
    headings += ["gap recovered"] if recovered else []
    rows = []
    for name, model in models.items():
        error, perplexity = model.get("standard_error"), model.get("perplexity")
        row = [
            name,
            f"{model['loss']:.3f}",
            "–" if error is None else f"{error:.3f}",
            "–" if perplexity is None else f"{perplexity:,.1f}",
            "–" if name == base else f"{model['loss'] - models[base]['loss']:+.3f}",
        ]
        row += [f"{recovered[name]:.0%}" if name in recovered else "–"] if recovered else []
        row += [f"{model['domains'][d]['loss']:.3f}" if d in model["domains"] else "–" for d in domains]
        rows.append(row)
    caption = (
        f"Mean next-token cross-entropy in nats over {evaluation['tokens']:,} held-out tokens "
        f"({evaluation['blocks']:,} blocks of {evaluation['sequence_length']:,}), the same for every model"
    )
    return Table(caption, [*headings, *domains], rows, [run.roles.get(name, "other") for name in models])


def stage_table(run: Run) -> Table:
    """Layout, memory and size of every stage; memory of GPUs where one was used."""
    rows = []
    gpus = [stage.record.get("peak_gpu_bytes") for stage in run.stages]
    for stage in run.stages:
        parallel = stage.config.get("parallel") or {}
        layout = [
            f"{letter}{parallel.get(name, 1)}"
            for letter, name in (("TP", "tensor"), ("PP", "pipeline"), ("DP", "data"))
        ]
        rows.append(
            [
                stage.name,
                stage.stage,
                " ".join(layout) if parallel else "–",
                size(stage.peak_rss),
                *([size(stage.record.get("peak_gpu_bytes"))] if any(gpus) else []),
                size(stage.size),
            ]
        )
    headings = ["stage", "kind", "layout", "peak memory", *(["peak GPU memory"] if any(gpus) else []), "output"]
    return Table("What each stage took; memory is the largest of its processes", headings, rows, ["" for _ in rows])


def export_table(run: Run) -> Table | None:
    """Size of every exported format, of quantized ones their loss too; None without an export."""
    parts = [(stage, part) for stage in run.stages if stage.stage == "export" for part in stage.parts()]
    if not parts:
        return None
    losses = _losses(run)
    measured = [_figures(stage, part, losses) for stage, part in parts]
    rows = [
        [
            f"{stage.name}/{part.name}",
            part.kind if figures is None or "algorithm" not in figures else f"{part.kind}, {figures['algorithm']}",
            size(part.size),
            *(_loss_of(figures) if any(measured) else []),
        ]
        for (stage, part), figures in zip(parts, measured, strict=True)
    ]
    headings = ["path", "format", "size", *(["held-out loss", "more than the float model"] if any(measured) else [])]
    return Table("What was exported", headings, rows, ["" for _ in rows])


def _figures(stage: StageRun, part: Part, losses: dict[Path, float]) -> dict[str, Any] | None:
    """The losses of a quantized part: those that the export measured, or an evaluation of its file."""
    if (figures := _quantized(stage).get(part.name.removeprefix("hf-"))) is not None:
        return figures
    source = stage.config.get("model")
    given = losses.get(Path(stage.config["output"]).absolute() / part.name)
    exact = losses.get(Path(source).absolute()) if isinstance(source, str) else None
    return None if given is None else {"loss": given, "float_loss": exact}


def _losses(run: Run) -> dict[Path, float]:
    """The loss of every model that an evaluation measured, by its path."""
    return {
        Path(model["path"]).absolute(): model["loss"]
        for _, evaluation in run.evaluations
        for model in evaluation["models"].values()
        if "path" in model
    }


def _quantized(stage: StageRun) -> dict[str, Any]:
    """The figures of an export's quantized models, by quantization."""
    metrics = stage.record.get("metrics")
    found = metrics.get("quantized") if isinstance(metrics, dict) else None
    return found if isinstance(found, dict) else {}


def _loss_of(figures: dict[str, Any] | None) -> list[str]:
    """Loss of a quantized export, and what it has more than the float model."""
    if figures is None:
        return ["–", "–"]
    try:
        if figures["float_loss"] is None:
            return [f"{figures['loss']:.4f}", "–"]
        return [f"{figures['loss']:.4f}", f"{figures['loss'] - figures['float_loss']:+.4f}"]
    except (KeyError, TypeError, ValueError):
        return ["–", "–"]


def step_boxes(run: Run) -> list[dict[str, str]]:
    """The pipeline picture: one box per stage."""
    return [
        {"name": stage.name, "kind": stage.stage, "time": duration(stage.seconds), "note": _box_note(stage, run)}
        for stage in run.stages
    ]


def _box_note(stage: StageRun, run: Run) -> str:
    """The most important figure of a stage."""
    model = next((model for model in run.models if model.name == stage.name), None)
    if model is not None:
        return f"{count(model.parameters)} parameters"
    if stage.stage == "score" and isinstance(samples := stage.config.get("samples"), int):
        return f"{samples:,} samples"
    for name, search in run.searches:
        if name == stage.name:
            return f"{len(search['candidates']):,} candidates"
    for name, evaluation in run.evaluations:
        if name == stage.name:
            return f"{len(evaluation['models'])} models"
    return size(stage.size)


def generations(evaluation: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """``[(prompt, [(model, answer), …]), …]``; the turns of conversations with the number of their question."""
    answers: dict[str, list[tuple[str, str]]] = {}
    for name, model in evaluation["models"].items():
        for answer in model.get("generations") or []:
            answers.setdefault(answer["prompt"], []).append((name, answer["text"]))
        for task, result in (model.get("harness") or {}).items():
            for chat in result.get("answers", []):  # conversations, which have no metrics
                for turn, (asked, text) in enumerate(zip(chat["turns"], chat["answers"], strict=True), 1):
                    answers.setdefault(f"{task} {chat['question']}, turn {turn}: {asked}", []).append((name, text))
    return list(answers.items())


def versions(run: Run) -> Table:
    """Versions that the stages recorded; where they differ, all of them."""
    versions: dict[str, list[str]] = {}
    for stage in run.stages:
        for package, version in (stage.record.get("versions") or {}).items():
            if version not in versions.setdefault(package, []):
                versions[package].append(version)
    return Table("Versions", ["package", "version"], [[name, ", ".join(v)] for name, v in versions.items()])


def count(number: float) -> str:
    """``134515008`` -> ``"134.5 M"``."""
    for unit in ("", " k", " M", " G"):
        if number < 1000:
            return f"{number:.1f}{unit}" if unit else f"{number:.0f}"
        number /= 1000
    return f"{number:.1f} T"


def size(number: float | None) -> str:
    """``1536`` -> ``"1.5 KiB"``."""
    if number is None:
        return "–"
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.1f} {unit}" if unit != "B" else f"{number:.0f} B"
        number /= 1024
    return f"{number:.2f} GiB"


def duration(seconds: float) -> str:
    """``134`` -> ``"2 min 14 s"``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, remaining = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {remaining:02d} s" if minutes else f"{remaining} s"
