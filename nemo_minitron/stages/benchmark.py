"""``minitron benchmark``: what models cost to serve, side by side."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.config import BenchmarkConfig
from nemo_minitron.errors import DataError, MissingDependency
from nemo_minitron.jobs.atomic import stage_output
from nemo_minitron.jobs.plans import DiskNeed, PlannedPath, StagePlan, human_bytes
from nemo_minitron.parsing import parse_json
from nemo_minitron.planning.disk import weights_bytes
from nemo_minitron.runtime.files import size_of
from nemo_minitron.runtime.memory import host_memory
from nemo_minitron.runtime.progress import progress_bar
from nemo_minitron.runtime.requirements import faults as requirement_faults
from nemo_minitron.serving.engine import Options
from nemo_minitron.serving.rounds import Load, Measured, Subject, measure, ratios, spread
from nemo_minitron.shape import uniform_faults
from nemo_minitron.stages.shared.disk import readable_model

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FILE_NAME", "plan", "run"]

FILE_NAME = "benchmark.json"
logger = logging.getLogger(__name__)


def plan(config: BenchmarkConfig) -> StagePlan:
    """What :func:`run` would read, write and cost."""
    runs = config.runs()
    each = config.batch_size * (config.prompt_tokens + config.new_tokens + 1)
    plan = StagePlan(
        "benchmark",
        reads=[PlannedPath(path, f"model {name!r}") for name, path in config.models.items()],
        writes=[PlannedPath(str(Path(config.output) / FILE_NAME), "sizes, memory and speeds")],
        costs={
            "runs": ", ".join(f"{name} in {engine}" for name, engine in runs),
            "measurements": f"{config.repeats + 1} of each run, in turns, {each:,} tokens each",
        },
    )
    if config.evaluation is not None:
        plan.reads.append(PlannedPath(config.evaluation, "evaluation"))
    if config.tokens:
        from nemo_minitron.data.inputs import data_inputs

        data = data_inputs(config.data)
        plan.reads += [PlannedPath(path, what) for path, what in data.files]
        plan.notes, plan.faults = data.notes, data.faults
        plan.costs["held-out tokens"] = f"{_blocks(config) * config.data.sequence_length:,}, for each model"
    if any(engine == "llama.cpp" for _, engine in runs):
        lacking = requirement_faults({"benchmark with llama.cpp": ["llama_cpp"]})
        if config.skip_missing:
            plan.notes += [f"left out: {line}" for line in lacking]
        else:
            plan.faults += lacking
    sizes = 0.0
    for name, engine in runs:
        model = readable_model(config.models[name])
        if model is None:
            continue
        if engine == "megatron":
            plan.faults += [
                f"model {name!r} in megatron: {fault}" for fault in uniform_faults(model.shape, "generation")
            ]
        context = model.architecture.max_position_embeddings
        if config.prompt_tokens + config.new_tokens + 1 > context:
            plan.faults.append(
                f"prompt_tokens={config.prompt_tokens} and new_tokens={config.new_tokens}: the context of model "
                f"{name!r} holds {context} tokens"
            )
        dtype = "bfloat16" if config.runtime.dtype == "bfloat16" else "float32"  # "auto" at most
        size = weights_bytes(model, dtype, padded=False)
        sizes += size
        if engine == "transformers" and _is_converted(config.models[name]):
            plan.disk.append(DiskNeed(f"{name} for transformers", config.output, size, stay=0.0))
    if sizes and config.together:
        _, free = host_memory()
        plan.costs["memory of all models"] = f"about {human_bytes(sizes)}"
        if sizes > free and config.runtime.device == "cpu":
            plan.faults.append(
                f"together=true: the models take about {human_bytes(sizes)}, and {human_bytes(free)} are free; set "
                "together=false, and each is loaded for its own turns"
            )
    return plan


def _runs(config: BenchmarkConfig) -> list[tuple[str, str]]:
    """``(model, engine)`` of what can be measured here.

    Raises:
        MissingDependency: without llama.cpp, unless it may be left out; where all would be left out, too.
    """
    runs = config.runs()
    if not any(engine == "llama.cpp" for _, engine in runs):
        return runs
    others = [(name, engine) for name, engine in runs if engine != "llama.cpp"]
    lacking = requirement_faults({"benchmark with llama.cpp": ["llama_cpp"]})
    if lacking and not (config.skip_missing and others):
        raise MissingDependency("\n".join(lacking))
    for line in lacking:
        logger.warning("GGUF files have size and loss alone: %s", line)
    return others if lacking else runs


def _blocks(config: BenchmarkConfig) -> int:
    return config.tokens // config.data.sequence_length


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Measure every model in every engine that runs it; write ``benchmark.json``.

    Returns:
        Its content: ``batch_size, prompt_tokens, new_tokens, repeats, threads, dtype, processor, loss_from, engines,
        models``. Each engine has ``version, device, baseline``; each model ``path, format, size_bytes, parameters,
        loss, engines``, and in each engine ``weights, memory_bytes, libraries_bytes, gpu_bytes, first_token_seconds,
        prefill_tokens_per_second, decode_tokens_per_second`` (median, low and high of the rounds) and ``ratios`` to the
        baseline (``size, memory, parameters``, and with median, low and high ``first_token, prefill, decode``).

    Raises:
        MinitronError: for a model that an engine cannot load, an evaluation of other models, or unusable text.
    """
    known = {} if config.evaluation is None else _evaluated(config)
    load = Load(
        config.batch_size,
        config.prompt_tokens,
        config.new_tokens,
        config.repeats,
        seed=config.runtime.seed,
        together=config.together,
    )
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    options = Options(
        dtype=config.runtime.dtype,
        device=config.runtime.device,
        threads=threads,
        context=config.data.sequence_length if config.tokens else 0,
        seed=config.runtime.seed,
    )
    with _subjects(config) as subjects, tempfile.TemporaryDirectory() as logs:
        total = len(subjects) * (config.repeats + 1)
        with progress_bar("measurements", total) as advance:
            measured = measure(
                subjects,
                load,
                options,
                logs=Path(logs),
                blocks=_held_out(config) if config.tokens else None,
                progress=advance,
            )
    result = {
        **{name: getattr(config, name) for name in ("batch_size", "prompt_tokens", "new_tokens", "repeats")},
        "threads": threads,
        "dtype": config.runtime.dtype,
        "processor": _processor(),
        "loss_from": _loss_from(config),
        "engines": _engines(config, measured),
        "models": {name: _model(config, name, measured, known) for name in config.models},
    }
    _compare(config, result, measured)
    with stage_output(config.output, config.overwrite) as output:
        (output / FILE_NAME).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


# --- what is measured


def _is_converted(path: str) -> bool:
    from nemo_minitron.checkpoints.formats import detect

    entry = detect(Path(path).expanduser())
    return entry is not None and entry.name != "hf"


@contextmanager
def _subjects(config: BenchmarkConfig) -> Iterator[list[Subject]]:
    """The models in their engines. What is no Hugging Face directory becomes a temporary one for transformers."""
    from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint

    output = Path(config.output).absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        subjects: list[Subject] = []
        for name, engine in _runs(config):
            path = config.models[name]
            if engine != "llama.cpp":
                checkpoint = open_checkpoint(path)  # also a name in the cache of the Hub
                path = str(checkpoint.path)
                if engine == "transformers" and checkpoint.format != "hf":
                    path = str(Path(scratch) / str(len(subjects)))
                    write_checkpoint(checkpoint, path, "hf", dtype=config.runtime.dtype)
            first = all(subject.model != name for subject in subjects)
            subjects.append(Subject(name, engine, path, losses=first and config.tokens > 0))
        yield subjects


def _held_out(config: BenchmarkConfig) -> Callable[[int], Sequence[Sequence[int]]]:
    """The blocks of the losses, cut with the tokenizer of the baseline."""
    from nemo_minitron.data import build_blocks

    names = [_baseline(config, config.models), *config.models]
    tokenizer = next((place for name in names if (place := _tokenizer(config.models[name])) is not None), None)
    if tokenizer is None:
        raise DataError("models: none carries a tokenizer that can be read; add a checkpoint that does, or tokens=0")

    def blocks(ids: int) -> Sequence[Sequence[int]]:
        held_out = build_blocks(config.data, tokenizer, "held_out", blocks=_blocks(config), vocab_size=ids)
        return held_out.tokens.tolist()

    return blocks


def _tokenizer(path: str) -> Path | None:
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.checkpoints.formats import detect

    entry = detect(Path(path).expanduser())
    if entry is not None and entry.open is None:
        return None
    return open_checkpoint(path).tokenizer


# --- losses


def _loss_from(config: BenchmarkConfig) -> dict[str, Any] | None:
    if config.evaluation is not None:
        return {"evaluation": config.evaluation}
    if not config.tokens:
        return None
    length = config.data.sequence_length
    sources = [source.name for source in config.data.all_sources()]
    return {"tokens": _blocks(config) * length, "sequence_length": length, "sources": sources}


def _evaluated(config: BenchmarkConfig) -> dict[str, float]:
    """The losses of an evaluation, by the names of the models here."""
    file = Path(str(config.evaluation)) / "evaluation.json"
    try:
        models = parse_json(file.read_text(encoding="utf-8"))["models"]
        by_path = {Path(model["path"]).absolute(): float(model["loss"]) for model in models.values()}
        by_name = {name: float(model["loss"]) for name, model in models.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"evaluation={config.evaluation}: is no output of evaluate ({error!r}); name one") from error
    losses = {}
    for name, path in config.models.items():
        if (place := Path(path).absolute()) in by_path:
            losses[name] = by_path[place]
        elif name in by_name and Path(path).suffix != ".gguf":  # which may be quantized
            losses[name] = by_name[name]
    if unknown := [name for name in config.models if name not in losses]:
        logger.warning(
            "evaluation=%s: has no loss of %s; the plots leave out what has none", config.evaluation, ", ".join(unknown)
        )
    return losses


# --- results


def _baseline(config: BenchmarkConfig, names: Sequence[str] | dict[str, str]) -> str:
    """The model that others of these are compared with."""
    baseline = config.baseline
    return baseline if baseline is not None and baseline in names else next(iter(names))


def _engines(config: BenchmarkConfig, measured: Sequence[Measured]) -> dict[str, Any]:
    engines: dict[str, Any] = {}
    for name in dict.fromkeys(result.subject.engine for result in measured):
        own = [result for result in measured if result.subject.engine == name]
        models = [result.subject.model for result in own]
        facts = {key: own[0].facts[key] for key in ("version", "device")}
        engines[name] = {**facts, "baseline": _baseline(config, models)}
    return engines


def _model(config: BenchmarkConfig, name: str, measured: Sequence[Measured], known: dict[str, float]) -> dict[str, Any]:
    from nemo_minitron.checkpoints.formats import detect

    own = [result for result in measured if result.subject.model == name]
    path = Path(config.models[name]).expanduser()
    place = path if path.exists() or not own else Path(own[0].subject.path)  # of a model in the Hub's cache
    losses = next((result.block_losses for result in own if result.block_losses), [])
    loss = statistics.fmean(losses) if losses else known.get(name)
    if loss is not None and not math.isfinite(loss):
        raise DataError(f"model {name!r}: its loss is {loss}; its weights are damaged")
    entry = detect(place)
    return {
        "path": config.models[name],
        "format": entry.name if entry is not None else None,
        "size_bytes": size_of(place),
        "parameters": own[0].facts["parameters"] if own else None,
        "loss": loss,
        "engines": {
            result.subject.engine: {
                "weights": result.facts["weights"],
                "memory_bytes": result.memory.peak,
                "libraries_bytes": result.memory.libraries,
                "gpu_bytes": result.memory.gpu,
                "first_token_seconds": spread(result.first_token),
                "prefill_tokens_per_second": spread(result.prefill),
                "decode_tokens_per_second": spread(result.decode),
            }
            for result in own
        },
    }


def _compare(config: BenchmarkConfig, content: dict[str, Any], measured: Sequence[Measured]) -> None:
    """Add to each model in each engine its ratios to the baseline there."""
    by_key = {(result.subject.model, result.subject.engine): result for result in measured}
    for (name, engine), result in by_key.items():
        base_name = content["engines"][engine]["baseline"]
        base, model, first = by_key[base_name, engine], content["models"][name], content["models"][base_name]
        model["engines"][engine]["ratios"] = {
            "size": round(model["size_bytes"] / first["size_bytes"], 4),
            "memory": round(result.memory.peak / base.memory.peak, 4),
            "parameters": round(result.facts["parameters"] / base.facts["parameters"], 4),
            "first_token": ratios(result.first_token, base.first_token),
            "prefill": ratios(result.prefill, base.prefill),
            "decode": ratios(result.decode, base.decode),
        }
        logger.info(
            "%s in %s: first token %.0f ms, prefill %.0f tokens/s, decoding %.1f tokens/s (%.2f of %s)",
            name, engine, 1000 * statistics.median(result.first_token), statistics.median(result.prefill),
            statistics.median(result.decode), model["engines"][engine]["ratios"]["decode"]["median"], base_name,
        )  # fmt: skip


def _processor() -> str:
    """The processor's name, as Linux gives it, and the cores that this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {len(os.sched_getaffinity(0))} cores"
