"""A plan as the content of a pipeline file: the stages, and why each choice was made."""

from __future__ import annotations

import math
from typing import Any

from nemo_minitron.checkpoints.formats import FORMATS, written_formats
from nemo_minitron.config import DataConfig, SourceConfig
from nemo_minitron.jobs.plans import human_bytes, human_count
from nemo_minitron.proposal.layout import Placed
from nemo_minitron.proposal.plan import PAPERS, Aligned, Plan, Refit, Request, settings
from nemo_minitron.proposal.schedule import correction_rate, dpo_rate, peak_rate, sft_rate, warmup_of
from nemo_minitron.proposal.shape import grid
from nemo_minitron.proposal.write import Choice
from nemo_minitron.search.space import Budget, SearchSpace, axis_values
from nemo_minitron.shape import SIZES

__all__ = ["pipeline"]

_TEACHER = "${output}/teacher"
_TEXT = "${vars.text}"
#: Of every stage on GPUs.
_RUNTIME = {"dtype": "bfloat16", "collective_timeout_minutes": 30}
#: Asked of every model, so that readers see answers beside losses.
_PROMPTS = ["What is the capital of France?", "Explain in two sentences why the sky is blue."]
_WORDS = {
    "num_layers": "layers",
    "hidden_size": "hidden size",
    "ffn_hidden_size": "MLP width",
    "num_attention_heads": "heads",
    "num_query_groups": "query groups",
    "num_moe_experts": "experts",
}


def pipeline(plan: Plan, request: Request) -> tuple[list[str], dict[str, Any]]:
    """The lines of the file's first comment, and its content.

    Args:
        plan: all choices.
        request: of the user.
    """
    teacher = "${output}/corrected/model" if plan.corrected else _TEACHER
    stages = [_import(plan, request)]
    if plan.corrected:
        stages.append(_correct(plan))
    stages.append(_score(plan, teacher))
    depth = _dropped(plan) if not request.search else 0
    if depth:
        stages.append(_depth(plan, teacher, depth))
    if request.search:
        stages.append(_search(plan, teacher))
    stages.append(_prune(plan, teacher, depth, search=request.search))
    if plan.refit is not None:
        stages.append(_reconstruct(plan, plan.refit, teacher))
    stages.append(_distill(plan, teacher))
    last = "${output}/distilled/model"
    if plan.sft is not None:
        stages.append(_sft(plan, plan.sft, last))
        last = "${output}/sft/model"
    if plan.dpo is not None:
        stages.append(_dpo(plan, plan.dpo, last))
        last = "${output}/dpo/model"
    stages += [_evaluate(plan, teacher), _export(plan, last), _report(plan)]
    return _head(plan, request), {
        "name": request.name,
        "output": request.output,
        "vars": {"text": _data(plan, request)},
        **({} if plan.machine.cluster is None else {"defaults": {"runtime": _RUNTIME}}),
        "stages": stages,
    }


def _head(plan: Plan, request: Request) -> list[str]:
    share = plan.student.parameters / plan.teacher.parameters
    lines = [
        f"{plan.subject.name}, {human_count(plan.teacher.parameters)} parameters, to "
        f"{'about ' if request.search else ''}{human_count(plan.student.parameters)} ({100 * share:.0f} %); proposed "
        f"by `minitron init` for {plan.machine.title}.",
        f"  minitron run {request.name}.yaml",
        "Look first:",
        f"  minitron run {request.name}.yaml --dry-run",
        "Every choice is yours to change; what a change touches is made again, the rest is kept.",
    ]
    return lines + [f"Note: {note}." for note in plan.notes]


def _data(plan: Plan, request: Request) -> dict[str, Any]:
    """The text, which all stages but those of the alignment read."""
    data, text = plan.data, plan.text
    sources: Any = [_source(counted.source) for counted in text.sources]
    if text.own:
        how = "tokens" if text.exact else "tokens, estimated from the beginning of each source"
        why = f"{human_count(text.tokens)} {how}"
        why += "; the sources are weighted by their tokens." if len(text.sources) > 1 else "."
    else:
        why = (
            "The text of Python packages. Your own belongs here, of the kind that the student will meet: {name, path}."
        )
    length = (
        "As in arXiv 2407.14679, or what model and text have."
        if plan.machine.cluster is not None
        else "Short, so that a processor makes many steps; the student keeps the context of the model."
    )
    content: dict[str, Any] = {"sequence_length": Choice(data.sequence_length, length)}
    if data.held_out_fraction != DataConfig().held_out_fraction:
        content["calibration_fraction"] = Choice(
            data.calibration_fraction, "Set aside, so that scoring and evaluation have whole blocks of every source."
        )
        content["held_out_fraction"] = data.held_out_fraction
    if data.begin_pieces:
        content["begin_pieces"] = Choice(True, "This model is lost in texts that do not begin with its first token.")
    if request.cache_dir != DataConfig().cache_dir:
        content["cache_dir"] = request.cache_dir
    return {**content, "sources": Choice(sources, why)}


def _source(source: SourceConfig) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": source.name}
    entry |= {"path": _text(source.path)} if source.path is not None else {"package": source.package}
    if source.text_key != "text":
        entry["text_key"] = source.text_key
    return entry | ({"weight": source.weight} if source.weight != 1.0 else {})


def _import(plan: Plan, request: Request) -> dict[str, Any]:
    subject = plan.subject
    stage: dict[str, Any] = {"stage": "import", "name": "teacher"}
    stage["package" if subject.package else "source"] = _text(subject.given)
    if subject.package and request.cache_dir != DataConfig().cache_dir:
        stage["cache_dir"] = request.cache_dir
    return stage


def _correct(plan: Plan) -> dict[str, Any]:
    made, rate = plan.amount, correction_rate(plan.teacher.parameters)
    assert plan.correction is not None
    return {
        "stage": "correct",
        "name": "corrected",
        "model": _TEACHER,
        "data": _TEXT,
        "steps": Choice(
            made.steps,
            "The teacher learns your text before it teaches on it (teacher correction, arXiv 2408.11796, section 2). "
            "If it has seen text like yours, remove this stage and let the others take ${output}/teacher.",
        ),
        "lr": Choice(rate, "0.6 of a distillation's at this size, as for Llama-3.1-8B."),
        "min_lr": _tenth(rate),
        "warmup_steps": warmup_of(made.steps, most=120),
        **_training_settings(plan, plan.correction, plan.part("correct")),
    }


def _score(plan: Plan, teacher: str) -> dict[str, Any]:
    wanted = "1,024 in the papers" + ("" if plan.samples == 1024 else "; fewer here, for the time or the text")
    stage: dict[str, Any] = {
        "stage": "score",
        "name": "scores",
        "model": teacher,
        "data": _TEXT,
        "samples": Choice(plan.samples, f"Blocks of calibration text: {wanted}."),
        "micro_batch_size": _passes(plan, plan.samples),
    }
    if plan.estimator != PAPERS:
        stage["estimator"] = Choice(
            plan.estimator,
            "What a unit costs once the reconstruction has made up for it: of a model that is reconstructed it chooses "
            "better units than the papers' activations (docs/results.md).",
        )
    return stage | _parallel(plan)


def _depth(plan: Plan, teacher: str, dropped: int) -> dict[str, Any]:
    why = (
        f"A run of {dropped} neighbouring layers goes, the one without which the loss rises least (arXiv 2408.11796, "
        "section 4)."
    )
    few = 16 if plan.machine.cluster is None else 128  # each candidate is run on all of them
    return {
        "stage": "depth",
        "name": "depth",
        "model": teacher,
        "data": _TEXT,
        "single": False,
        "block_lengths": Choice([dropped], why),
        "samples": max(1, min(plan.samples, few)),
        "micro_batch_size": _passes(plan, min(plan.samples, few)),
        **_parallel(plan),
    }


def _search(plan: Plan, teacher: str) -> dict[str, Any]:
    shape, student = plan.teacher.shape, plan.student.shape
    space = {
        "num_layers": {"min": max(1, math.floor(0.7 * shape.num_layers)), "multiple": 1 + (shape.num_layers >= 24)},
        "hidden_size": {"min": _floor(min(student.hidden_size, shape.hidden_size * 3 / 4), grid(shape.hidden_size)),
                        "multiple": grid(shape.hidden_size)},
        "ffn_hidden_size": {"min": _floor(student.ffn_hidden_size / 2, grid(shape.ffn_hidden_size, 32)),
                            "multiple": grid(shape.ffn_hidden_size, 32)},
    }  # fmt: skip
    steps = max(4, plan.amount.steps // 10)
    rate = peak_rate(plan.student.parameters)
    budget = dict(plan.budget.search)
    if "memory_gib" not in budget:
        budget["tolerance"] = _tolerance(plan, space)
    short: dict[str, Any] = {
        "steps": Choice(steps, "A tenth of the distillation; the papers take about 300 steps to rank shapes."),
        "micro_batch_size": plan.placed.micro_batch_size,
        "global_batch_size": plan.amount.batch,
        "lr": rate,
        "min_lr": _tenth(rate),
        "warmup_steps": warmup_of(steps),
    }
    if plan.machine.cluster is not None:
        short["precision"] = "bf16-mixed"
    return {
        "stage": "search",
        "name": "search",
        "model": teacher,
        "scores": "${output}/scores",
        "data": _TEXT,
        "space": Choice(space, "Layers, hidden size and MLP width around the papers' proportions."),
        "budget": budget,
        "max_candidates": Choice(16, "Shapes that are ranked without training, spread over all that fit."),
        "best": Choice(3, "Of these so many are distilled briefly, and ranked again."),
        "samples": min(32, max(1, plan.samples // 2)),
        "micro_batch_size": _passes(plan, 32),
        "distill": short,
        **_parallel(plan, node=True),
    }


def _tolerance(plan: Plan, space: dict[str, dict[str, int]]) -> float:
    """The least tolerance under which some shapes fit."""
    from nemo_minitron.proposal.shape import ParameterCost

    shape = plan.teacher.shape
    values = {
        name: axis_values(name, getattr(shape, name), minimum=axis["min"], multiple=axis["multiple"])
        for name, axis in space.items()
    }
    cost = ParameterCost(plan.teacher.table, shape)
    for tolerance in (0.01, 0.02, 0.05, 0.1):
        low, high = (plan.budget.most * (1 + sign * tolerance) for sign in (-1, 1))
        try:
            if len(SearchSpace(shape, values).fitting([Budget("parameters", low, high, cost)])) >= 8:
                return tolerance
        except Exception:  # noqa: S112 - a wider one is tried
            continue
    return 0.2


def _prune(plan: Plan, teacher: str, depth: int, *, search: bool) -> dict[str, Any]:
    own, target = plan.teacher.shape, plan.student.shape
    cut = {name: getattr(target, name) for name in SIZES if getattr(target, name) != getattr(own, name)}
    stage: dict[str, Any] = {"stage": "prune", "name": "pruned", "model": teacher, "scores": "${output}/scores"}
    if search:
        stage["target"] = Choice("${output}/search", "The best shape of the search.")
    else:
        parts = ", ".join(f"{_WORDS[name]} {getattr(own, name)} to {size}" for name, size in cut.items())
        why = f"{plan.budget.option} by {plan.proportions.why}: {parts}."
        stage["target"] = Choice(cut, why)
    if plan.estimator != PAPERS:
        stage["method"] = plan.estimator
    if depth:
        stage |= {"depth_scores": "${output}/depth", "depth": {"criterion": "loss", "form": "contiguous"}}
    if layout := settings(plan.placed.layout):
        stage["student_layout"] = layout
    return stage


def _reconstruct(plan: Plan, refit: Refit, teacher: str) -> dict[str, Any]:
    why = (
        f"{human_count(refit.tokens)} tokens of calibration text: before any training the matrices are refitted to the "
        f"teacher, in about {_minutes(refit.seconds / 60)}. More text and time give more (docs/reconstruction.md)."
    )
    stage: dict[str, Any] = {
        "stage": "reconstruct",
        "name": "reconstructed",
        "model": "${output}/pruned",
        "teacher": teacher,
        "data": _TEXT,
        "samples": Choice(refit.samples, why),
        "micro_batch_size": _passes(plan, refit.samples),
    }
    if (held := int(0.9 * plan.blocks["held_out"])) < 16:
        stage["held_out_samples"] = max(1, held)
    return stage | ({"parallel": {"data": refit.data}} if refit.data > 1 else {})


def _distill(plan: Plan, teacher: str) -> dict[str, Any]:
    made, rate = plan.amount, peak_rate(plan.student.parameters)
    bound = {
        "parameters": "20 tokens for each parameter of the student",
        "text": "all of the text, once",
        "time": f"what fits in about {_minutes(plan.part('distill'))}",
        "steps": "as asked for",
    }[made.bound]
    why = f"{human_count(made.tokens)} tokens: {bound}. More tokens help: the papers' students saw 94 to 380 billion."
    return {
        "stage": "distill",
        "name": "distilled",
        "student": "${output}/pruned" if plan.refit is None else "${output}/reconstructed",
        "teacher": teacher,
        "data": _TEXT,
        "steps": Choice(made.steps, why),
        "lr": Choice(rate, "1e-4 at 4.5 B parameters (arXiv 2408.11796), by the fourth root of their number."),
        "min_lr": _tenth(rate),
        "warmup_steps": warmup_of(made.steps),
        **_training_settings(plan, plan.placed, plan.part("distill")),
    }


def _training_settings(plan: Plan, placed: Placed, minutes: float | None) -> dict[str, Any]:
    made = plan.amount
    steps = made.steps
    every = max(1, min(1000, steps // 3 if steps < 300 else steps // 10))
    stage: dict[str, Any] = {
        "global_batch_size": Choice(made.batch, f"Sequences of a step, {made.batch * made.sequence_length:,} tokens."),
        "micro_batch_size": Choice(
            placed.micro_batch_size, f"Of a pass; a rank takes about {human_bytes(placed.memory)}."
        ),
        "validate_every": every,
        "validation_batches": max(1, min(8, int(0.9 * plan.blocks["held_out"]) // made.batch)),
        "save_every": every,
    }
    if minutes is not None:
        stage["max_minutes"] = Choice(
            math.ceil(1.5 * minutes), "A training that takes longer than was estimated ends in good order."
        )
    if plan.machine.cluster is not None:
        stage["precision"] = "bf16-mixed"
        if placed.recompute != "none":
            stage["recompute"] = Choice(placed.recompute, "Or else the activations do not fit.")
        if placed.logits != "whole":
            vocabulary = max(plan.student.shape.vocab_size, plan.teacher.shape.vocab_size)
            why = f"No layout holds all logits of a micro-batch: {vocabulary:,} numbers for each token of each model."
            stage["logits"] = Choice(placed.logits, why)
    if layout := settings(placed.layout):
        why = f"The fastest of {placed.considered} layouts that the planner compares on {plan.machine.title}."
        stage["parallel"] = Choice(layout, why)
    return stage


def _sft(plan: Plan, aligned: Aligned, model: str) -> dict[str, Any]:
    why = "1e-5 at 8 B parameters, by the root of their number."
    return _alignment(plan, aligned, "sft", model, sft_rate(plan.student.parameters), why)


def _dpo(plan: Plan, aligned: Aligned, model: str) -> dict[str, Any]:
    return _alignment(plan, aligned, "dpo", model, dpo_rate(plan.student.parameters), "A tenth of fine-tuning's.")


def _alignment(plan: Plan, aligned: Aligned, kind: str, model: str, rate: float, why: str) -> dict[str, Any]:
    answers = aligned.answers
    data: dict[str, Any] = {
        "path": _text(answers.path),
        "template": Choice(answers.template, f"How conversations become text: {answers.why}."),
        "max_length": answers.length,
        "held_out_fraction": answers.held_out_fraction,
    }
    if answers.dropped:
        data["long"] = Choice("drop", f"{100 * answers.dropped:.1f} % of the samples are longer, and are left out.")
    every = max(1, aligned.steps // 2)
    epoch = max(1, answers.trained // aligned.batch)
    seen = "all samples once" if aligned.steps == epoch else f"{100 * aligned.steps / epoch:.0f} % of the samples"
    stage: dict[str, Any] = {
        "stage": kind,
        "name": kind,
        "model": model,
        "data": data,
        "steps": Choice(aligned.steps, f"{seen}; there are {answers.samples:,}."),
        "global_batch_size": aligned.batch,
        "micro_batch_size": aligned.micro_batch,
        "lr": Choice(rate, why),
        "min_lr": _tenth(rate),
        "warmup_steps": 0 if aligned.steps < 2 else warmup_of(aligned.steps, most=10),
        "validate_every": every,
        "save_every": every,
    }
    if (minutes := plan.part(kind)) is not None:
        stage["max_minutes"] = math.ceil(1.5 * minutes)
    if plan.machine.cluster is not None:
        stage["precision"] = "bf16-mixed"
    if layout := settings(aligned.layout):
        stage["parallel"] = layout
    return stage


def _evaluate(plan: Plan, teacher: str) -> dict[str, Any]:
    models = {"teacher": _TEACHER}
    if plan.corrected:
        models["corrected"] = teacher
    models["pruned"] = "${output}/pruned"
    if plan.refit is not None:
        models["reconstructed"] = "${output}/reconstructed"
    models["distilled"] = "${output}/distilled/model"
    models |= {kind: f"${{output}}/{kind}/model" for kind in ("sft", "dpo") if getattr(plan, kind) is not None}
    most = 12288 if plan.machine.cluster is None else 2**18
    length = plan.data.sequence_length
    return {
        "stage": "evaluate",
        "name": "evaluation",
        "models": models,
        "baseline": "teacher",
        "data": _TEXT,
        "tokens": Choice(
            min(most, int(0.9 * plan.blocks["held_out"]) * length) // length * length or length,
            "Held-out tokens; none of them is trained on. Benchmarks: harness (docs/evaluation.md).",
        ),
        "micro_batch_size": _passes(plan, plan.blocks["held_out"]),
        "prompts": _PROMPTS,
        **_parallel(plan, alone=True),
    }


def _export(plan: Plan, model: str) -> dict[str, Any]:
    shape, architecture = plan.student.shape, plan.student.architecture
    formats = [
        name
        for name in written_formats()
        if name in ("hf", "nemo2") and not FORMATS[name].refuses(shape, architecture, export=True)
    ]
    return {"stage": "export", "name": "export", "model": model, "formats": formats or ["hf"]}


def _report(plan: Plan) -> dict[str, Any]:
    aligned = " and aligned" if plan.sft is not None or plan.dpo is not None else ""
    return {"stage": "report", "title": f"{plan.subject.name}, pruned, distilled{aligned}"}


# ---------------------------------------------------------------------------------------------------------------- parts


def _dropped(plan: Plan) -> int:
    """Layers that go as one run: from a sixth of them on; fewer are chosen as well by the scores (docs/results.md)."""
    own = plan.teacher.shape.num_layers
    dropped = own - plan.student.shape.num_layers
    return dropped if dropped * 6 >= own and dropped > 1 else 0


def _passes(plan: Plan, blocks: int) -> int:
    """Blocks of a forward pass, which keeps no activations: up to 4."""
    size = max(plan.placed.micro_batch_size, 4 if plan.machine.cluster is None else 1)
    while size > max(1, blocks) or (plan.machine.cluster is None and size * plan.data.sequence_length > 2048):
        size //= 2
    return max(1, size)


def _parallel(plan: Plan, *, alone: bool = False, node: bool = False) -> dict[str, Any]:
    """The layout of a stage: of the distillation, or, if alone, of one replica; on one node at most if asked for."""
    layout = settings(plan.placed.layout)
    cluster = plan.machine.cluster
    if alone:
        layout.pop("data", None)
    if node and cluster is not None and layout.get("data"):
        share = max(1, cluster.gpus_per_node // (plan.placed.layout.tensor * plan.placed.layout.pipeline))
        layout["data"] = min(layout["data"], share)
    return {"parallel": layout} if layout else {}


def _floor(size: float, multiple: int) -> int:
    return max(multiple, int(size // multiple) * multiple)


def _tenth(rate: float) -> float:
    return float(f"{rate / 10:.1e}")


def _minutes(minutes: float | None) -> str:
    if minutes is None:
        return "the time"
    return f"{minutes / 60:.3g} hours" if minutes >= 120 else f"{minutes:.3g} minutes"


def _text(value: str | None) -> str:
    """A value of the user, in which nothing is an interpolation."""
    return str(value).replace("${", "\\${")
