"""Forward KL over split vocabularies: memory, time and gradient error against the obvious form and ModelOpt's loss.

    python benchmarks/kl.py [--quick] [--device cpu|cuda|auto]

Three losses run on the same logits, forward and backward, one thread a rank:

- ``obvious``: all-gather the logits, ``log_softmax`` of both, ``kl_div``;
- ``modelopt``: ``LogitsKLLoss`` of nvidia-modelopt;
- ``ours``: :func:`nemo_minitron.distillation.losses.vocabulary_parallel.vocabulary_parallel_forward_kl`, its gradient
  in a tensor of its own, and ``ours_inplace``, written over the student's logits.

Memory is the peak of resident memory above the inputs (``VmHWM``, reset before each loss), of the largest rank; on CUDA
the peak of torch's allocator. Time is the best of several; on CUDA between two events of the device. There four times
as many tokens run, and a case of two ranks needs two GPUs: it is left out where there is one. The gradient error is the
largest difference from float64 autograd on whole logits, over its largest entry.

A second part measures the output layers with the loss, forward and backward, from the hidden states of both models to
the gradients of the student's hidden states and output layer, at V = 128256 and one rank: ``whole`` makes all logits,
as a training with ``logits: whole`` does, and ``fused`` a chunk at a time
(:mod:`nemo_minitron.distillation.losses.fused_head`), in seconds of the processor. ``head_memory_ratio`` and
``head_time_ratio`` are fused over whole, ``head_gradient_difference`` the largest difference of a gradient over its
largest entry.

The last line is JSON: ``time_ratio_modelopt``, ``memory_ratio_modelopt``, ``memory_ratio_modelopt_inplace`` (worst over
the cases) and the cases; on CUDA ``device`` too, the GPU's name. Where ModelOpt is not installed the ratios are null.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

LOSSES = ("obvious", "modelopt", "ours", "ours_inplace")
#: Vocabulary of the second part.
HEAD_VOCABULARY = 128256


def _resident(field: str) -> int:
    """Bytes of ``VmRSS`` or ``VmHWM``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(field)


def _losses(vocab: int) -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """Each takes ``[s, b, V/tp]`` logits of student and teacher and returns the mean over tokens."""
    from nemo_minitron.distillation.losses.reference import forward_kl
    from nemo_minitron.distillation.losses.vocabulary_parallel import vocabulary_parallel_forward_kl

    world = dist.get_world_size()
    group = dist.group.WORLD
    assert group is not None

    def obvious(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        from torch.distributed.nn.functional import all_gather

        if world == 1:
            return forward_kl(student, teacher).mean()
        whole = [torch.cat(all_gather(logits), -1) for logits in (student, teacher)]
        # The backward of all_gather sums the equal gradients of all ranks.
        return forward_kl(*whole).mean() / world

    def ours(student: torch.Tensor, teacher: torch.Tensor, inplace: bool = False) -> torch.Tensor:
        return vocabulary_parallel_forward_kl(student, teacher, group, vocab_size=vocab, inplace=inplace).mean()

    return {
        "obvious": obvious,
        **_peer(world),
        "ours": ours,
        "ours_inplace": lambda student, teacher: ours(student, teacher, inplace=True),
    }


def _peer(world: int) -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """ModelOpt's loss, where ModelOpt is installed."""
    if importlib.util.find_spec("modelopt") is None:
        return {}
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    peer = LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=world, sequence_parallel=False))

    def modelopt(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        loss = peer(student, teacher)
        loss = loss[0] if isinstance(loss, tuple) else loss
        return loss.mean()

    return {"modelopt": modelopt}


class _CpuCost:
    """Seconds by the clock and peak bytes of resident memory, between :meth:`start` and :meth:`stop`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._libc, self._clock = ctypes.CDLL(None), clock

    def start(self) -> None:
        # A loss that finds memory left by the one before would seem to need none, and would be spared the page
        # faults that tensors above 32 MB always cost.
        self._libc.malloc_trim(0)
        dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")
        self._before, self._started = _resident("VmRSS"), self._clock()

    def stop(self) -> tuple[float, float]:
        return self._clock() - self._started, float(_resident("VmHWM") - self._before)


class _CudaCost:
    """Seconds between two events of the device and peak bytes of torch's allocator."""

    def start(self) -> None:
        torch.cuda.empty_cache()
        dist.barrier()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._events[0].record()

    def stop(self) -> tuple[float, float]:
        self._events[1].record()
        torch.cuda.synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1e3, torch.cuda.max_memory_allocated() - self._before


def rank(device: str, vocab: int, tokens: int, repeats: int, out: Path) -> None:
    """One rank of one case."""
    from nemo_minitron.runtime import cpu

    place = cpu.prepare(device)
    torch.set_num_threads(1)
    place.use()
    dist.init_process_group(place.backend)
    from megatron.core import parallel_state

    world, number = dist.get_world_size(), dist.get_rank()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    generator = torch.Generator().manual_seed(0)
    columns = vocab // world
    mine = slice(number * columns, (number + 1) * columns)
    whole = [4 * torch.randn(tokens, 1, vocab, generator=generator) for _ in range(2)]
    student, teacher = (logits[..., mine].clone().to(place.torch) for logits in whole)
    exact = _exact_gradient(*(logits.to(place.torch) for logits in whole))[..., mine].clone()
    del whole
    gc.collect()

    found: dict[str, Any] = {}
    cost = _CudaCost() if place.is_cuda else _CpuCost()
    for name, loss in _losses(vocab).items():
        times, peaks, error = [], [], 0.0
        for _ in range(repeats + 1):
            # The loss gets logits that a layer has computed: they may be overwritten, and their gradient is read.
            logits = student.clone().requires_grad_()
            computed = logits.view_as(logits)
            gc.collect()
            cost.start()
            loss(computed, teacher).backward()
            seconds, peak = cost.stop()
            times.append(seconds)
            peaks.append(peak)
            assert logits.grad is not None
            error = ((logits.grad - exact).abs().max() / exact.abs().max()).item()
            del logits, computed
        reduced = torch.tensor([min(times[1:]), max(peaks[1:]), error], dtype=torch.float64, device=place.torch)
        dist.all_reduce(reduced, op=dist.ReduceOp.MAX)
        found[name] = dict(zip(("seconds", "bytes", "gradient_error"), reduced.tolist(), strict=True))
    if number == 0:
        out.write_text(json.dumps(found))


def head_rank(device: str, vocab: int, tokens: int, repeats: int, out: Path, size: int) -> None:
    """Output layers and loss, whole and fused, from hidden states of a size."""
    from nemo_minitron.config import LossConfig
    from nemo_minitron.distillation.losses.fused_head import OutputHead, fused_head_loss
    from nemo_minitron.distillation.losses.vocabulary_parallel import vocabulary_parallel_forward_kl
    from nemo_minitron.runtime import cpu

    place = cpu.prepare(device)
    torch.set_num_threads(1)
    place.use()
    dist.init_process_group(place.backend)
    group = dist.group.WORLD
    assert group is not None
    generator = torch.Generator().manual_seed(0)
    hidden, theirs = (torch.randn(tokens, 1, size, generator=generator).to(place.torch) for _ in range(2))
    weight, their_weight = (0.2 * torch.randn(vocab, size, generator=generator).to(place.torch) for _ in range(2))
    mask = torch.ones(tokens, 1, device=place.torch)

    def whole(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher = theirs @ their_weight.T
        losses = vocabulary_parallel_forward_kl(hidden @ weight.T, teacher, group, vocab_size=vocab, inplace=True)
        return (losses * mask).sum()

    def fused(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return fused_head_loss(
            OutputHead(hidden, weight),
            OutputHead(theirs, their_weight),
            group,
            vocab_size=vocab,
            loss=LossConfig(),
            token_weights=mask,
        ).total

    cost = _CudaCost() if place.is_cuda else _CpuCost(time.process_time)
    found: dict[str, Any] = {}
    gradients: dict[str, list[torch.Tensor]] = {}
    for name, loss in {"whole": whole, "fused": fused}.items():
        times, peaks = [], []
        for _ in range(repeats + 1):
            leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            gc.collect()
            cost.start()
            loss(*leaves).backward()
            seconds, peak = cost.stop()
            times.append(seconds)
            peaks.append(peak)
        gradients[name] = [leaf.grad for leaf in leaves if leaf.grad is not None]
        found[name] = {"seconds": min(times[1:]), "bytes": max(peaks[1:])}
    pairs = zip(gradients["fused"], gradients["whole"], strict=True)
    found["gradient_difference"] = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    out.write_text(json.dumps(found))


def _exact_gradient(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Gradient of the mean KL over tokens, in float64, a token at a time."""
    gradient = torch.empty_like(student)
    for index in range(len(student)):
        p, q = (torch.softmax(logits[index].double(), -1) for logits in (teacher, student))
        gradient[index] = ((q - p) / len(student)).float()
    return gradient


def _measured(kind: str, device: str, vocab: int, world: int, tokens: int, repeats: int, *more: int) -> dict[str, Any]:
    """What the ranks of a case, each a process, found."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        out = Path(folder) / "found.json"
        command = [sys.executable, __file__, kind, device, str(vocab), str(tokens), str(repeats), str(out)]
        command += map(str, more)
        ranks = [
            subprocess.Popen(
                command,
                env={
                    **os.environ, "RANK": str(place), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "LOCAL_RANK": str(place),
                    "CUDA_DEVICE_MAX_CONNECTIONS": "1", "NVIDIA_TF32_OVERRIDE": "0",
                },
                stderr=subprocess.DEVNULL,
            )
            for place in range(world)
        ]  # fmt: skip
        if any(process.wait(timeout=3600) for process in ranks):
            raise SystemExit(f"a rank of V={vocab} TP={world} failed")
        return dict(json.loads(out.read_text()))


def case(device: str, vocab: int, world: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Run a case in processes of its own."""
    found = _measured("--rank", device, vocab, world, tokens, repeats)
    peer = found.get("modelopt")

    def ratio(name: str, what: str) -> float | None:
        return found[name][what] / peer[what] if peer else None

    return {
        "vocab": vocab,
        "tensor_parallel": world,
        "tokens": tokens,
        "losses": found,
        "time_ratio_modelopt": ratio("ours", "seconds"),
        "memory_ratio_modelopt": ratio("ours", "bytes"),
        "memory_ratio_modelopt_inplace": ratio("ours_inplace", "bytes"),
    }


def main() -> None:
    """Run the cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases, under 50 s")
    devices = ("cpu", "cuda", "auto")
    parser.add_argument("--device", choices=devices, default="cpu", help="auto: CUDA where there is any")
    arguments = parser.parse_args()
    quick, place = arguments.quick, decided(arguments.device)
    sizes = [(128256, 1), (128256, 2)] if quick else [(v, tp) for v in (32000, 128256, 256000) for tp in (1, 2)]
    tokens = 128 if quick else 512
    if place.is_cuda:
        tokens *= 4
        sizes = [(vocab, world) for vocab, world in sizes if world <= place.count]
    cases = []
    for vocab, world in sizes:
        cases.append(case(place.type, vocab, world, tokens=tokens, repeats=1 if quick else 3))
        last = cases[-1]
        print(f"V={vocab} TP={world}")
        for name in (name for name in LOSSES if name in last["losses"]):
            row = last["losses"][name]
            seconds, megabytes, error = row["seconds"], row["bytes"] / 1e6, row["gradient_error"]
            print(f"  {name:13} {seconds:7.3f} s  {megabytes:8.0f} MB  gradient {error:.1e}")
    sizes_of_head = (1536, 1, 256) if quick else (4096, 3, 512)
    head = _measured("--head", place.type, HEAD_VOCABULARY, 1, *sizes_of_head)
    whole, fused = head["whole"], head["fused"]
    for name, row in (("whole", whole), ("fused", fused)):
        print(f"output layers and loss, {name}: {row['seconds']:7.3f} s  {row['bytes'] / 1e6:8.0f} MB")
    heads = {
        "head_memory_ratio": fused["bytes"] / whole["bytes"],
        "head_time_ratio": fused["seconds"] / whole["seconds"],
        "head_gradient_difference": head["gradient_difference"],
    }
    worst = ("time_ratio_modelopt", "memory_ratio_modelopt", "memory_ratio_modelopt_inplace")
    ratios = {key: max((c[key] for c in cases if c[key] is not None), default=None) for key in worst}
    device = {"device": torch.cuda.get_device_name()} if place.is_cuda else {}
    print(json.dumps({**ratios, **heads, **device, "cases": cases, "head": head}))


def decided(device: str) -> Any:
    """The device that was asked for; one line and exit code 2 where it is not there."""
    from nemo_minitron.errors import ConfigError
    from nemo_minitron.runtime import device as devices

    try:
        return devices.decide(device)
    except ConfigError:
        print(f"--device {device}: torch sees no CUDA device here; use --device cpu or auto", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    if sys.argv[1:2] in (["--rank"], ["--head"]):
        (rank if sys.argv[1] == "--rank" else head_rank)(
            sys.argv[2],
            int(sys.argv[3]),
            int(sys.argv[4]),
            int(sys.argv[5]),
            Path(sys.argv[6]),
            *map(int, sys.argv[7:]),
        )
    else:
        main()
