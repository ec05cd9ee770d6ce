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


def write_run(run: Path, *, steps: int = 200) -> Path:
    """A finished demonstration."""
    run.mkdir(parents=True, exist_ok=True)
    parallel = {"tensor": 1, "pipeline": 2, "data": 1}
    write_model(write_stage(run, "teacher", "import", seconds=31, minute=0), TEACHER)
    write_scores(write_stage(run, "scores", "score", seconds=74.3, minute=1, samples=128, parallel=parallel))
    pruned = write_stage(run, "pruned", "prune", seconds=8.21, minute=3, method="activation")
    write_model(pruned, STUDENT)
    write_kept(pruned)
    write_model(write_stage(run, "random", "prune", seconds=7.9, minute=4, method="random"), STUDENT)
    roles = {"student": str(run / "pruned"), "teacher": str(run / "teacher"), "parallel": parallel}
    distilled = write_stage(run, "distilled", "distill", seconds=361, minute=5, **roles)
    write_model(distilled / "model", STUDENT)
    write_metrics(distilled, steps)
    write_evaluation(write_stage(run, "evaluation", "evaluate", seconds=122, minute=12), run, LOSSES)
    export = write_stage(run, "export", "export", seconds=40, minute=14)
    write_model(export / "hf", STUDENT)
    (export / "hf" / "config.json").write_text("{}")
    (export / "nemo2" / "context").mkdir(parents=True)
    (export / "model.nemo").write_bytes(bytes(200_000))
    (run / "pipeline.json").write_text(json.dumps({"name": "demo", "stages": []}))
    return run
