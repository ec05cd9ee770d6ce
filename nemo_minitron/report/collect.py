"""The contents of a run directory, read from the files that the stages wrote. Nothing else is computed.

If a file is missing, its part of the report is left out. A file that exists but cannot be read is listed in
:attr:`Run.remarks`, so that no gap goes unnoticed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_minitron import axes
from nemo_minitron.architecture import Architecture
from nemo_minitron.errors import DataError, MinitronError
from nemo_minitron.jobs import skipped
from nemo_minitron.jobs.manifest import MANIFEST, is_manifest
from nemo_minitron.parsing import parse_json
from nemo_minitron.report.run import Curve, Model, Run, ScoreSet, StageRun, stage_of
from nemo_minitron.runtime.files import is_earlier, size_of
from nemo_minitron.shape import ModelShape

__all__ = ["Curve", "Model", "Run", "ScoreSet", "StageRun", "collect", "stage_of"]

#: Where a stage that makes a model has its ``minitron.json``.
_PLACES = ("", "model", "sft/model")


def collect(directory: str | Path) -> Run:
    """Read a run directory.

    Raises:
        DataError: if it is not a directory, or holds no finished stage.
    """
    path = Path(directory)
    if not path.is_dir():
        raise DataError(f"{path}: no such run directory; give the output of `minitron run`")
    run = Run(path, path.resolve().name)
    manifest = _json(path / MANIFEST, run)
    if is_manifest(manifest):
        run.name = manifest["name"]
    elif manifest is not None:
        run.remarks.append(f"{MANIFEST} is not that of a run of this suite; left out")
    run.stages = _stages(path, run)
    if not run.stages:
        raise DataError(f"{path}: holds no finished stage (no record.json); run the stages first")
    for stage in run.stages:
        if (reader := _READERS.get(stage.stage)) is not None:
            reader(stage, run)
        if stage.kind.MAKES_MODEL:
            _model(stage, run)
    for _, evaluation in run.evaluations:
        for name, model in evaluation["models"].items():
            origin = stage_of(model["path"], run)
            run.roles.setdefault(name, "other" if origin is None else _role(origin, run))
            if origin is not None:
                run.origins.setdefault(name, origin)
    for _, serving in run.servings:
        for name, model in serving["models"].items():
            origin = stage_of(model["path"], run)
            run.roles.setdefault(name, "other" if origin is None else _role(origin, run))
    return run


def _stages(path: Path, run: Run) -> list[StageRun]:
    stages = []
    for file in [*path.glob("*/record.json"), *path.glob("*.nemo.record.json")]:
        record = _json(file, run)
        if record is None:
            continue
        output = file.parent if file.name == "record.json" else file.with_name(file.name.removesuffix(".record.json"))
        if is_earlier(output):
            continue
        try:
            stage = StageRun(record["name"], record["stage"], output, size_of(output), record)
            _ = (float(stage.seconds), Path(stage.config["output"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            run.remarks.append(f"{file.relative_to(path)} is not a record of a stage ({error!r}); left out")
            continue
        if stage.stage != "report":
            stages.append(stage)
        metrics = record.get("metrics")
        if isinstance(metrics, dict) and (count := metrics.get(skipped.METRIC)):
            where = skipped.skipped_path(output).relative_to(path)
            run.remarks.append(f"{stage.name} left out {count} bad records of its data, which {where} lists")
    return sorted(stages, key=lambda stage: (str(stage.record.get("started") or ""), stage.name))


def _json(path: Path, run: Run) -> Any:
    """Content of a JSON file; None, with a remark, where it cannot be read."""
    if not path.is_file():
        return None
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        run.remarks.append(f"{path.relative_to(run.path)} cannot be read ({error}); left out")
        return None


def _role(stage: StageRun, run: Run) -> str:
    if stage.stage == "prune" and stage.config.get("method") == "random":
        return "random"
    if stage.stage == "export":  # what it is was decided before
        made = stage_of(str(stage.config.get("model")), run)
        return stage.kind.ROLE if made is None or made is stage else _role(made, run)
    return stage.kind.ROLE


def _model(stage: StageRun, run: Run) -> None:
    for place in _PLACES:
        file = stage.path / place / "minitron.json"
        content = _json(file, run)
        if content is None:
            continue
        try:
            shape = ModelShape.from_dict(content["shape"])
            table = axes.family(Architecture(**content["architecture"]).family)
            lineage = content.get("lineage") or {}
        except (AttributeError, KeyError, TypeError, MinitronError) as error:
            run.remarks.append(f"{file.relative_to(run.path)} is not a model record ({error!r}); left out")
            continue
        count, kept = axes.parameter_count(table, shape), _kept(stage, shape, run)
        run.models.append(Model(stage.name, _role(stage, run), shape, count, kept, file.parent, lineage))
        return


def _kept(stage: StageRun, shape: ModelShape, run: Run) -> dict[str, Any] | None:
    """The kept units in a pruning's ``kept.json``."""
    content = _json(stage.path / "kept.json", run)
    if content is None:
        return None
    try:
        kept = content["kept"]
        lengths = {name: len(kept[name]) for name in ("layers", "hidden", "ffn", "groups", "heads")}
        if lengths["layers"] != shape.num_layers or lengths["heads"] != shape.num_layers:
            raise ValueError(f"{lengths['layers']} layers, of which the model has {shape.num_layers}")
    except (KeyError, TypeError, ValueError) as error:
        run.remarks.append(f"the kept units of {stage.name} cannot be understood ({error!r}); left out")
        return None
    return kept


def _scores(stage: StageRun, run: Run) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(stage.path / "scores.safetensors")
    except (OSError, SafetensorError) as error:
        run.remarks.append(f"the scores of {stage.name} cannot be read ({error}); left out")
        return
    info = _json(stage.path / "scores.json", run)
    run.scores.append(ScoreSet(stage.name, arrays, info if isinstance(info, dict) else {}))


def _curve(stage: StageRun, run: Run) -> None:
    path = stage.path / "metrics.jsonl"
    if not path.is_file():
        run.remarks.append(f"{stage.name} left no metrics.jsonl; its curves are left out")
        return
    if (curve := _read_curve(stage.name, path, run)) is not None:
        run.curves.append(curve)


def _alignment(stage: StageRun, run: Run) -> None:
    """The curves of a training, and of each round of one that has several."""
    for path in [stage.path / "metrics.jsonl", *sorted(stage.path.glob("round-*/metrics.jsonl"))]:
        part = path.parent.relative_to(stage.path)
        name = stage.name if part == Path() else f"{stage.name} {part}"
        if path.is_file() and (curve := _read_curve(name, path, run)) is not None:
            run.alignments.append(curve)


def _read_curve(name: str, path: Path, run: Run) -> Curve | None:
    train: list[dict[str, Any]] = []
    validation: list[dict[str, Any]] = []
    bad = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = parse_json(line)
            if not isinstance(row, dict):
                raise ValueError("no object")
            (validation if row.get("split") == "validation" else train).append(row)
        except ValueError:
            bad += 1
    if bad:
        run.remarks.append(f"{path.relative_to(run.path)}: {bad} unreadable lines are left out")
    return Curve(name, train, validation) if train or validation else None


def _evaluation(stage: StageRun, run: Run) -> None:
    content = _json(stage.path / "evaluation.json", run)
    if content is None:
        return
    try:
        _ = [content[name] + 0 for name in ("tokens", "blocks", "sequence_length")]
        models = {name: str(model["path"]) for name, model in content["models"].items()}
        if content["baseline"] not in models:
            raise ValueError(f"no model is the baseline {content['baseline']!r}")
        losses = {name: content["models"][name]["loss"] for name in models}
        losses |= {
            f"{name} on {domain}": part["loss"]
            for name in models
            for domain, part in content["models"][name]["domains"].items()
        }
        if bad := [name for name, loss in losses.items() if not math.isfinite(loss)]:
            raise ValueError(f"the loss of {bad[0]} is {losses[bad[0]]}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        run.remarks.append(f"the evaluation of {stage.name} is incomplete ({error!r}); left out")
        return
    run.evaluations.append((stage.name, content))


def _search(stage: StageRun, run: Run) -> None:
    content = _json(stage.path / "search.json", run)
    if content is None:
        return
    try:
        names = [candidate["name"] for candidate in content["candidates"]]
        if content["best"] not in names:
            raise ValueError(f"the best, {content['best']!r}, is not among its candidates")
    except (KeyError, TypeError, ValueError) as error:
        run.remarks.append(f"the search of {stage.name} is incomplete ({error!r}); left out")
        return
    run.searches.append((stage.name, content))


def _serving(stage: StageRun, run: Run) -> None:
    content = _json(stage.path / "benchmark.json", run)
    if content is None:
        return
    try:
        for key in ("batch_size", "prompt_tokens", "new_tokens", "repeats", "threads", "processor", "loss_from"):
            _ = content[key]
        for name, model in content["models"].items():
            _ = (str(model["path"]), model["size_bytes"] + 0, 0.0 if model["loss"] is None else model["loss"] + 0)
            for engine, own in model["engines"].items():
                if content["engines"][engine]["baseline"] not in content["models"]:
                    raise ValueError(f"no model is the baseline of {engine}")
                _ = (own["weights"], own["memory_bytes"] + 0, own["gpu_bytes"] + 0, own["ratios"]["size"] + 0)
                figures = [own[key] for key in _FIGURES] + [own["ratios"][key] for key in ("prefill", "decode")]
                if any(not math.isfinite(figure[key]) for figure in figures for key in ("median", "low", "high")):
                    raise ValueError(f"a figure of {name} in {engine} is not finite")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        run.remarks.append(f"the benchmark of {stage.name} is incomplete ({error!r}); left out")
        return
    run.servings.append((stage.name, content))


_FIGURES = ("first_token_seconds", "prefill_tokens_per_second", "decode_tokens_per_second")


def _reconstruction(stage: StageRun, run: Run) -> None:
    content = _json(stage.path / "reconstruction.json", run)
    if content is None:  # beside a .nemo file there is none
        return
    try:
        _ = [matrix["ridge"] for layer in content["layers"] for matrix in layer["matrices"]]
        for values in content.get("losses", {}).values():  # earlier releases measured none
            _ = [values[model] + 0 for model in ("teacher", "pruned", "reconstructed", "blocks")]
    except (AttributeError, KeyError, TypeError) as error:
        run.remarks.append(f"the reconstruction of {stage.name} is incomplete ({error!r}); left out")
        return
    run.reconstructions.append((stage.name, content))


_READERS: dict[str, Callable[[StageRun, Run], None]] = {
    "score": _scores,
    "correct": _curve,
    "distill": _curve,
    "evaluate": _evaluation,
    "search": _search,
    "benchmark": _serving,
    "reconstruct": _reconstruction,
    **dict.fromkeys(("sft", "dpo", "reinforce", "steerlm2"), _alignment),
}
