"""Every stage as a user starts it, with ``runtime.device=cuda`` and with ``runtime.device=cpu``, from the same inputs.

A stage's inputs are what the CPU made of the stages before it, so each stage is held against the CPU by itself. Weights
that are only read, cut and written are equal bit by bit; what is computed, within the tolerances below, in float32.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.chats import chat_checkpoint, chats, preferences, write_jsonl
from support.steering import labelled_rows
from support.tier import DEVICE_VARIABLE, FLOAT32, close, environment, layer_specs, missing, tail

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

SPECS = layer_specs(os.environ.get(DEVICE_VARIABLE, "cuda"))
#: Relative, of losses in training: each step's difference goes into the weights of the next.
LOSS = 2e-3
NEMO = ("nemo", "lightning", "nemo_run")
ALIGNER = (*NEMO, "nemo_aligner")
#: NeMo's own formats are written where NeMo is; without it, as with the carried wheels, stages hand on Hugging Face.
FORMAT = "hf" if missing("nemo") else "nemo2"
EXPORTS = {"hf": "hf"} if missing("nemo") else {"hf": "hf", "nemo2": "nemo2", "nemo": "model.nemo"}

TEXT: dict[str, Any] = {
    "sources": [{"name": "text", "path": "{home}/text.jsonl"}], "sequence_length": 32, "calibration_fraction": 0.3,
    "held_out_fraction": 0.2, "cache_dir": "{home}/cache",
}  # fmt: skip
STEPS: dict[str, Any] = {
    "steps": 3, "global_batch_size": 2, "lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 0, "validate_every": 3,
    "save_every": 3,
}  # fmt: skip
TRAINING = {**STEPS, "data": TEXT, "validation_batches": 1}
CHATS = {"template": "chatml", "max_length": 96, "held_out_fraction": 0.2}
ALIGNMENT = {**STEPS, "verify": False}

#: Stage by stage: its settings, the stages whose outputs it reads, and the modules that it needs beyond Megatron-core.
#: ``{home}`` is the folder of the inputs, ``{cpu}`` that of the CPU's outputs.
STAGES: dict[str, tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "import": ({"source": "{home}/hf", "format": FORMAT}, (), ()),
    "score": ({"model": "{cpu}/import", "data": TEXT, "samples": 8, "micro_batch_size": 2}, ("import",), ()),
    "depth": (
        {"model": "{cpu}/import", "data": TEXT, "samples": 8, "micro_batch_size": 2, "block_lengths": [2]},
        ("import",), (),
    ),
    "prune": (
        {"model": "{cpu}/import", "scores": "{cpu}/score", "format": FORMAT,
         "target": {"num_layers": 2, "ffn_hidden_size": 48}},
        ("import", "score"), (),
    ),
    "cache": (
        {"teacher": "{cpu}/import", "data": TEXT, "steps": 3, "global_batch_size": 2, "validation_batches": 1, "k": 8,
         "values": "float32"},
        ("import",), (),
    ),
    "generate": (
        {"model": "{cpu}/import", "template": "chatml", "batch_size": 2, "prompts": {"path": "{home}/prompts.jsonl"},
         "sampling": {"greedy": True, "max_new_tokens": 6}},
        ("import",), (),
    ),
    "evaluate": (
        {"models": {"teacher": "{cpu}/import", "pruned": "{cpu}/prune"}, "baseline": "teacher", "tokens": 512,
         "data": TEXT, "prompts": ["how many apples"], "max_new_tokens": 4},
        ("import", "prune"), (),
    ),
    "export": ({"model": "{cpu}/prune", "formats": list(EXPORTS)}, ("prune",), ()),
    "distill": (
        {"student": "{cpu}/prune", "teacher": "{cpu}/import", "intermediate": {"hidden": "mse"}, **TRAINING},
        ("import", "prune"), NEMO,
    ),
    "correct": ({"model": "{cpu}/import", **TRAINING}, ("import",), NEMO),
    "sft": (
        {"model": "{cpu}/import", "data": {"path": "{home}/chats.jsonl", **CHATS}, **ALIGNMENT}, ("import",), ALIGNER,
    ),
    "dpo": (
        {"model": "{cpu}/import", "data": {"path": "{home}/pairs.jsonl", **CHATS}, **ALIGNMENT}, ("import",), ALIGNER,
    ),
    "reward": (
        {"model": "{cpu}/import", "data": {"path": "{home}/labelled.jsonl", **CHATS}, **STEPS}, ("import",), ALIGNER,
    ),
    "steerlm": (
        {"model": "{cpu}/import", "data": {"path": "{home}/labelled.jsonl", **CHATS}, "reward": STEPS, **ALIGNMENT},
        ("import",), ALIGNER,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model, text, conversations, pairs, prompts."""
    home = tmp_path_factory.mktemp("stages")
    chat_checkpoint(home / "hf")
    texts = [f"how many apples are {n} and {n + 1}? there are {2 * n + 1} apples, and {n} more." for n in range(300)]
    write_jsonl(home / "text.jsonl", [{"text": text} for text in texts])
    write_jsonl(home / "chats.jsonl", chats(24))
    write_jsonl(home / "pairs.jsonl", preferences(24))
    write_jsonl(home / "labelled.jsonl", labelled_rows(24))
    write_jsonl(home / "prompts.jsonl", [{"prompt": row["prompt"]} for row in preferences(4)])
    return home


def filled(value: Any, **folders: Path) -> Any:
    """Settings with the folders in the place of their names."""
    if isinstance(value, dict):
        return {name: filled(one, **folders) for name, one in value.items()}
    if isinstance(value, list):
        return [filled(one, **folders) for one in value]
    return value.format(**folders) if isinstance(value, str) else value


@pytest.fixture(scope="module")
def run(home: Path) -> Callable[[str, str, str], Path]:
    """``(stage, device, spec) -> output``. Each stage runs once on each; those that it needs run on the CPU first."""
    done: dict[tuple[str, str, str], Path] = {}

    def one(stage: str, device: str, spec: str) -> Path:
        key = (stage, device, spec)
        if key not in done:
            settings, needs, _ = STAGES[stage]
            for parent in needs:
                reference(parent)
            folder = home / ("cpu" if spec == "reference" else f"{device}-{spec}")
            folder.mkdir(exist_ok=True)
            config = {
                **filled(settings, home=home, cpu=home / "cpu"),
                "output": str(folder / stage),
                "runtime": {"device": device, "threads": 1, "timeout_minutes": 8},
            }
            (folder / f"{stage}.yaml").write_text(yaml.safe_dump(config))
            variables = environment(device, "local" if spec == "reference" else spec) | {"MINITRON_COLD": "1"}
            with (folder / f"{stage}.log").open("wb") as log:
                code = subprocess.run(
                    [sys.executable, "-m", "nemo_minitron", stage, str(folder / f"{stage}.yaml")],
                    env=variables, cwd=folder, stdout=log, stderr=log, timeout=500, check=False,
                ).returncode  # fmt: skip
            assert code == 0, f"{stage} on {device} ({spec}): exit {code}\n{tail(folder / f'{stage}.log', 60)}"
            done[key] = folder / stage
        return done[key]

    def reference(stage: str) -> Path:
        return one(stage, "cpu", "reference")

    return one


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_does_as_on_the_cpu(run: Callable[[str, str, str], Path], device: str, stage: str, spec: str) -> None:
    if reason := missing(*STAGES[stage][2]):
        pytest.skip(reason)
    expected, found = run(stage, "cpu", "reference"), run(stage, device, spec)
    record = json.loads((found / "record.json").read_text())
    assert record["config"]["runtime"]["device"] == device
    HOLDS[stage](found, expected)


def same_weights(found: Path, expected: Path) -> None:
    """Bit by bit."""
    from nemo_minitron.checkpoints import open_checkpoint

    one, other = (open_checkpoint(path).weights for path in (found, expected))
    assert sorted(one.names()) == sorted(other.names())
    for name in one.names():
        assert torch.equal(one.tensor(name), other.tensor(name)), name


def same_scores(found: Path, expected: Path) -> None:
    from nemo_minitron.importance import Scores

    one, other = Scores.load(found), Scores.load(expected)
    for part in ("ffn", "heads", "groups", "hidden", "layers"):
        close(getattr(one, part), getattr(other, part), FLOAT32, f"scores of {part}")


def same_depth(found: Path, expected: Path) -> None:
    from nemo_minitron.importance.depth_scores import DepthScores

    one, other = DepthScores.load(found).measured, DepthScores.load(expected).measured
    assert one.keys() == other.keys()
    for layers, measurement in one.items():
        assert measurement.loss == pytest.approx(other[layers].loss, rel=FLOAT32), layers


def same_logits(found: Path, expected: Path) -> None:
    """The kept log-probabilities; of the tokens that have them, a few may stand in another order."""
    from safetensors.torch import load_file

    shards = sorted(path.name for path in expected.glob("*.safetensors"))
    assert shards
    for name in shards:
        one, other = load_file(found / name), load_file(expected / name)
        assert one.keys() == other.keys()
        for key in one:
            if one[key].is_floating_point():
                close(one[key], other[key], FLOAT32, f"{name}: {key}")
            else:
                assert float((one[key] != other[key]).float().mean()) < 0.01, f"{name}: {key}"


def same_answers(found: Path, expected: Path) -> None:
    one, other = (sorted(path.glob("*.jsonl")) for path in (found, expected))
    assert [path.name for path in one] == [path.name for path in other]
    assert other
    for ours, theirs in zip(one, other, strict=True):
        assert ours.read_text() == theirs.read_text(), ours.name


def same_evaluation(found: Path, expected: Path) -> None:
    one, other = (json.loads((path / "evaluation.json").read_text())["models"] for path in (found, expected))
    assert one.keys() == other.keys()
    for name in one:
        assert one[name]["loss"] == pytest.approx(other[name]["loss"], rel=FLOAT32), name


def same_exports(found: Path, expected: Path) -> None:
    for name in EXPORTS.values():
        same_weights(found / name, expected / name)


def same_training(found: Path, expected: Path) -> None:
    """Every loss of every line of the metrics."""
    one, other = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (found, expected)
    )
    assert len(one) == len(other) > 1
    compared = 0
    for ours, theirs in zip(one, other, strict=True):
        for name, value in theirs.items():
            if name in ("loss", "kl", "lm_loss", "hidden") or name.endswith("_loss"):
                assert math.isfinite(value)
                assert ours[name] == pytest.approx(value, rel=LOSS, abs=1e-6), (name, ours, theirs)
                compared += 1
    assert compared >= len(one)


def same_steerlm(found: Path, expected: Path) -> None:
    for part in ("attribute_model", "sft"):
        same_training(found / part, expected / part)


HOLDS: dict[str, Callable[[Path, Path], None]] = {
    "import": same_weights,
    "score": same_scores,
    "depth": same_depth,
    "prune": same_weights,
    "cache": same_logits,
    "generate": same_answers,
    "evaluate": same_evaluation,
    "export": same_exports,
    "distill": same_training,
    "correct": same_training,
    "sft": same_training,
    "dpo": same_training,
    "reward": same_training,
    "steerlm": same_steerlm,
}
