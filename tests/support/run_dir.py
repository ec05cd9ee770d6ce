"""A run directory as the stages leave it, with invented figures: what the report is tested on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

VERSIONS = {"python": "3.11.7", "nemo-minitron": "0.1.0", "torch": "2.13.0+cpu", "megatron-core": "0.13.1"}
TEACHER = {
    "num_layers": 30,
    "hidden_size": 576,
    "ffn_hidden_size": 1536,
    "num_attention_heads": 9,
    "num_query_groups": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "tied_embeddings": True,
}
STUDENT = {**TEACHER, "num_layers": 28, "ffn_hidden_size": 832}
PROMPTS = ["What is the capital of France?", "Explain <lists> in Python | briefly."]
LOSSES = {"teacher": 3.221, "pruned": 4.655, "random": 11.27, "distilled": 3.842}


def write_stage(run: Path, name: str, stage: str, *, seconds: float, minute: int, **config: Any) -> Path:
    """An output directory with its record."""
    path = run / name
    path.mkdir(parents=True)
    record = {
        "version": 1,
        "name": name,
        "stage": stage,
        "hash": name,
        "settings": {},
        "parents": {},
        "config": {"output": str(path), "name": name, **config},
        "metrics": {},
        "started": f"2025-01-01T12:{minute:02d}:00+00:00",
        "seconds": seconds,
        "peak_rss_bytes": 1_600_000_000 + 1000 * minute,
        "versions": VERSIONS,
    }
    (path / "record.json").write_text(json.dumps(record))
    return path


def write_model(path: Path, shape: dict[str, Any], lineage: dict[str, Any] | None = None) -> None:
    """``minitron.json`` and something that weighs."""
    path.mkdir(exist_ok=True)
    content = {"format_version": 1, "shape": shape, "architecture": {"family": "llama"}, "lineage": lineage or {}}
    (path / "minitron.json").write_text(json.dumps(content))
    (path / "weights.bin").write_bytes(bytes(300_000))


def write_kept(path: Path) -> None:
    """``kept.json``: layers 12 and 17 go, and in layer 3 head 8."""
    layers = [layer for layer in range(30) if layer not in (12, 17)]
    heads = [[[0, 1, 2], [3, 4, 5], [6, 7] if layer == 3 else [6, 7, 8]] for layer in layers]
    kept = {"layers": layers, "hidden": list(range(576)), "ffn": [list(range(832))] * 28}
    kept |= {"groups": [[0, 1, 2]] * 28, "heads": heads}
    (path / "kept.json").write_text(json.dumps({"format_version": 1, "kept": kept}))


def write_scores(path: Path) -> None:
    """Scores with the look of real ones: heavy tails, first and last layers apart."""
    generator = np.random.default_rng(0)
    depth = np.linspace(-1, 1, 30)[:, None]
    arrays = {
        "ffn": np.exp(generator.normal(size=(30, 1536)) * 0.9 + 2 * depth**2),
        "heads": np.exp(generator.normal(size=(30, 9)) * 0.6 + depth),
        "groups": np.exp(generator.normal(size=(30, 3)) * 0.6 + depth),
        "hidden": np.exp(generator.normal(size=576) * 0.5) + 80 * (generator.random(576) > 0.99),
        "layers": 0.04 + 0.3 * depth[:, 0] ** 4 + 0.02 * generator.random(30),
    }
    save_file(arrays, path / "scores.safetensors")
    info = {"format_version": 1, "samples": 128, "tokens": 32768, "sequence": "mean", "batch": "l2"}
    (path / "scores.json").write_text(json.dumps(info))


def write_metrics(path: Path, steps: int) -> None:
    """``metrics.jsonl`` of a distillation."""
    generator = np.random.default_rng(1)
    rows = []
    for step in range(1, steps + 1):
        kl = 0.55 + 1.1 * math.exp(-step / 35) + 0.07 * generator.normal()
        row = {"step": step, "tokens": step * 1024, "kl": kl, "lr": 3e-4 * min(1, step / 10), "grad_norm": 1.0}
        rows.append({**row, "tokens_per_second": 240 + 8 * generator.normal(), "seconds": 4.2 * step})
        if step % 25 == 0:
            loss = 3.25 + 1.1 * math.exp(-step / 35)
            rows.append({"step": step, "tokens": step * 1024, "split": "validation", "kl": kl + 0.03, "lm_loss": loss})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_evaluation(path: Path, run: Path, losses: dict[str, float]) -> None:
    """``evaluation.json``."""
    answers = {
        "teacher": "The capital of France is Paris.",
        "pruned": "The capital of France is the capital of the capital.",
        "random": "",
        "distilled": "The capital of France is Paris, a city\nin the north.",
    }
    models = {}
    for name, loss in losses.items():
        domains = {"technical": loss + 0.1, "scripture": loss - 0.5, "plays": loss + 0.4}
        models[name] = {
            "loss": loss,
            "standard_error": 0.05,
            "tokens": 32768,
            "blocks": 128,
            "perplexity": math.exp(loss),
            "domains": {domain: {"loss": value, "standard_error": 0.08} for domain, value in domains.items()},
            "path": str(run / ("distilled/model" if name == "distilled" else name)),
            "generations": [{"prompt": prompt, "text": answers.get(name, "…"), "tokens": 8} for prompt in PROMPTS],
        }
    content = {"tokens": 32768, "blocks": 128, "sequence_length": 256, "baseline": "teacher", "models": models}
    (path / "evaluation.json").write_text(json.dumps(content))


def made_from(made_by: str, model: Path, shape: dict[str, Any], lineage: dict[str, Any], **how: Any) -> dict[str, Any]:
    """The lineage of a model that was made from another."""
    return {"made_by": made_by, **how, "parents": {"model": {"path": str(model), "shape": shape, "lineage": lineage}}}


def lineages(run: Path) -> dict[str, dict[str, Any]]:
    """What ``minitron.json`` of each model says of where it comes from."""
    teacher = {"made_by": "import", "source": "/models/SmolLM2-135M"}
    pruned, random = (
        made_from("prune", run / "teacher", TEACHER, teacher, method=method) for method in ("activation", "random")
    )
    distilled = {**pruned, "distilled": {"student": str(run / "pruned"), "teacher": str(run / "teacher"), "steps": 200}}
    export = made_from("export", run / "distilled/model", STUDENT, distilled)
    return {"teacher": teacher, "pruned": pruned, "random": random, "distilled": distilled, "export": export}


def write_run(run: Path, *, steps: int = 200) -> Path:
    """A finished demonstration."""
    of = lineages(run)
    run.mkdir(parents=True, exist_ok=True)
    parallel = {"tensor": 1, "pipeline": 2, "data": 1}
    write_model(write_stage(run, "teacher", "import", seconds=31, minute=0), TEACHER, of["teacher"])
    write_scores(write_stage(run, "scores", "score", seconds=74.3, minute=1, samples=128, parallel=parallel))
    pruned = write_stage(run, "pruned", "prune", seconds=8.21, minute=3, method="activation")
    write_model(pruned, STUDENT, of["pruned"])
    write_kept(pruned)
    write_model(write_stage(run, "random", "prune", seconds=7.9, minute=4, method="random"), STUDENT, of["random"])
    roles = {"student": str(run / "pruned"), "teacher": str(run / "teacher"), "parallel": parallel}
    distilled = write_stage(run, "distilled", "distill", seconds=361, minute=5, **roles)
    write_model(distilled / "model", STUDENT, of["distilled"])
    write_metrics(distilled, steps)
    write_evaluation(write_stage(run, "evaluation", "evaluate", seconds=122, minute=12), run, LOSSES)
    export = write_stage(run, "export", "export", seconds=40, minute=14, model=str(run / "distilled/model"))
    write_model(export / "hf", STUDENT, of["export"])
    (export / "hf" / "config.json").write_text("{}")
    (export / "nemo2" / "context").mkdir(parents=True)
    (export / "model.nemo").write_bytes(bytes(200_000))
    (run / "pipeline.json").write_text(json.dumps({"name": "demo", "stages": []}))
    return run


SHAPES = {"hidden_size": 576, "num_query_groups": 3, "num_attention_heads": 9, "num_moe_experts": None}


def write_search(path: Path) -> None:
    """``search.json``: two shapes, of which the second is that of the student."""
    candidates = []
    for name, layers, ffn, loss in (("l28", 28, 832, 4.7), ("l20", 20, 1536, 4.9)):
        sizes = {**SHAPES, "num_layers": layers, "ffn_hidden_size": ffn}
        values = {"memory": 200_000_000, "prefill": 0.031, "decode": 0.0041, "prefill_ratio": 0.7, "decode_ratio": 0.8}
        candidates.append(
            {
                "name": name, "state": "distilled", "sizes": sizes, "parameters": 93_372_480, **values, "loss": loss,
                "standard_error": 0.02, "distilled_loss": loss - 0.3, "distill_seconds": 60.0, "outside": None,
            }
        )  # fmt: skip
    fronts = {"parameters": {"loss": ["l28"], "distilled_loss": ["l28"]}, "prefill": {"loss": ["l28"]}}
    unpruned = {"prefill": 0.044, "decode": 0.0052, "prefill_ratio": 1.0, "decode_ratio": 1.0, "loss": 3.3}
    content = {
        "format_version": 1, "shapes": 7, "left_out": 5, "best": "l28", "unpruned": unpruned, "tokens": 4096,
        "distill_tokens": 8192, "kendall_tau": 1.0, "pareto": fronts, "candidates": candidates, "budget": {},
    }  # fmt: skip
    (path / "search.json").write_text(json.dumps(content))


def write_alignment(path: Path, steps: int, **metrics: float) -> None:
    """``metrics.jsonl`` of an alignment."""
    path.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = [{"split": "validation", "step": 0, "loss": 2.0, **metrics}]
    rows += [{"step": step, "loss": 2.0 - step / (2 * steps), "lr": 1e-5, **metrics} for step in range(1, steps + 1)]
    rows.append({"split": "validation", "step": steps, "loss": 1.6, **metrics})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def note_parents(run: Path, **parents: dict[str, str]) -> None:
    """Write into the records of stages what they read: path below the run by setting."""
    for stage, paths in parents.items():
        file = run / stage / "record.json"
        record = json.loads(file.read_text())
        record["parents"] = {name: {"path": str(run / path), "hash": path[:1] * 40} for name, path in paths.items()}
        file.write_text(json.dumps(record))


def write_aligned_run(run: Path, *, steps: int = 20) -> Path:
    """A finished run with every part that a report knows: search, logit cache, benchmarks, alignment, export of it."""
    of = lineages(run)
    write_run(run, steps=steps)
    write_search(write_stage(run, "search", "search", seconds=300, minute=2, model=str(run / "teacher")))
    logits = write_stage(run, "logits", "cache", seconds=40, minute=4, teacher=str(run / "teacher"), steps=steps)
    (logits / "manifest.json").write_text(json.dumps({"version": 1, "teacher": "0123456789abcdef"}))
    sft = {**of["distilled"], "sft": {"model": str(run / "distilled/model"), "template": "chatml", "steps": steps}}
    dpo = {**sft, "dpo": {"model": str(run / "sft/model"), "loss": "rpo_bwd_kl"}}
    for name, lineage, model, minute in (("sft", sft, "distilled/model", 13), ("dpo", dpo, "sft/model", 15)):
        path = write_stage(run, name, name, seconds=90, minute=minute, model=str(run / model), steps=steps, lr=1e-5)
        write_model(path / "model", STUDENT, lineage)
    write_alignment(run / "sft", steps)
    write_alignment(run / "dpo/round-1", steps, acc=0.8)
    record = json.loads((run / "sft/record.json").read_text())
    record["metrics"] = {"samples": 90, "steps": steps, "first_validation_loss": 2.0, "last_validation_loss": 1.6}
    (run / "sft/record.json").write_text(json.dumps(record))
    moved = {"before": {"accuracy": 0.5, "margin": 0.0}, "after": {"accuracy": 0.8, "margin": 0.3}}
    record = json.loads((run / "dpo/record.json").read_text())
    record["metrics"] = {
        "pairs": [80],
        "held_out": [10],
        "rounds": [moved],
    }
    (run / "dpo/record.json").write_text(json.dumps(record))
    aligned = write_stage(run, "aligned", "export", seconds=5, minute=17, model=str(run / "dpo/model"))
    write_model(aligned / "hf", STUDENT, made_from("export", run / "dpo/model", STUDENT, dpo))
    (aligned / "hf/config.json").write_text("{}")
    models = {"teacher": 3.2, "pruned": 4.6, "distilled": 3.8, "sft": 3.7, "exported": 3.6}
    benched = write_stage(run, "benchmarks", "evaluate", seconds=99, minute=18, tokens=33_000)
    write_evaluation(benched, run, models)
    content = json.loads((benched / "evaluation.json").read_text())
    content["models"]["sft"]["path"] = str(run / "sft/model")
    content["models"]["exported"]["path"] = str(run / "aligned/hf")
    for number, model in enumerate(content["models"].values()):
        metrics = {"acc,none": 0.3 + number / 50, "acc_stderr,none": 0.02, "f1,strict": 0.5}
        model["harness"] = {"arc_easy": {"metrics": metrics, "samples": 200, "num_fewshot": 5, "version": "1"}}
        model["tokens_per_second"] = 1000.0 + number
    (benched / "evaluation.json").write_text(json.dumps(content))
    note_parents(
        run,
        scores={"model": "teacher"},
        search={"model": "teacher", "scores": "scores"},
        pruned={"model": "teacher", "scores": "scores"},
        logits={"teacher": "teacher"},
        distilled={"student": "pruned", "teacher_cache": "logits"},
        sft={"model": "distilled/model"},
        dpo={"model": "sft/model"},
        export={"model": "distilled/model"},
        aligned={"model": "dpo/model"},
    )
    record = json.loads((run / "distilled/record.json").read_text())
    record["config"] |= {"teacher": None, "teacher_cache": str(run / "logits")}
    (run / "distilled/record.json").write_text(json.dumps(record))
    return run
