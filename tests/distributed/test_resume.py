"""A training that is killed, preempted or broken: what follows is what would have been, or nothing was changed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import tiny_checkpoint
from support.distributed import run_distributed

SEQUENCE, STEPS, BATCH = 32, 28, 4
MEASURED = (
    "split", "step", "tokens", "kl", "lm_loss", "lr", "grad_norm", "hidden", "embedding", "attention", "alpha",
)  # fmt: skip


def train_once(
    models: str, out: str, layout: dict[str, Any], at: tuple[int, signal.Signals | None] | None = None, **changes: Any
) -> str:
    """Distil; after step ``at`` this process dies (None) or gets a signal. Returns the error's name, or ""."""
    import lightning.pytorch as pl

    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.config import IntermediateConfig
    from nemo_minitron.distillation import callbacks
    from nemo_minitron.distillation.recipe import Schedule, distill
    from nemo_minitron.errors import MinitronError
    from nemo_minitron.runtime.groups import ParallelLayout

    # 15 blocks, four a step: passes over the data begin in the middle of steps
    blocks = torch.randint(6, 131, (15, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))
    values: dict[str, Any] = {
        "steps": STEPS, "micro_batch_size": 1, "global_batch_size": BATCH, "lr": 1e-3, "min_lr": 1e-4,
        "warmup_steps": 2, "validate_every": 12, "validation_batches": 1, "save_every": 6, "keep_best": "kl",
    }  # fmt: skip
    advance = callbacks.ProgressBar.on_train_batch_end

    def interrupted(self: Any, trainer: pl.Trainer, *arguments: Any) -> None:
        advance(self, trainer, *arguments)
        if at is not None and trainer.global_step == at[0] and trainer.is_global_zero:
            if at[1] is None:
                os._exit(0)
            os.kill(os.getpid(), at[1])

    callbacks.ProgressBar.on_train_batch_end = interrupted
    try:
        distill(
            open_checkpoint(Path(models) / "student"),
            open_checkpoint(Path(models) / "teacher"),
            blocks,
            blocks[:BATCH],
            layout=ParallelLayout(**layout),
            schedule=Schedule(**{**values, **changes}),
            directory=Path(out),
            intermediate=IntermediateConfig(hidden="mse", relation_heads=6, balance="dynamic"),
        )
    except MinitronError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        callbacks.ProgressBar.on_train_batch_end = advance
    return ""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 8, "intermediate_size": 72}
    tiny_checkpoint(folder / "teacher", tied=True, num_hidden_layers=5, seed=1, **sizes)
    tiny_checkpoint(folder / "student", tied=True, num_hidden_layers=4, seed=2, **{**sizes, "hidden_size": 36})
    return folder


def lines(directory: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in MEASURED if name in line} for line in found]


def assert_equal(directory: Path, expected: Path) -> None:
    """Every line of the metrics, all weights of the last and of the best checkpoint, bit for bit."""
    from nemo_minitron.checkpoints import open_checkpoint

    assert lines(directory) == lines(expected)
    for part in ("checkpoints/step=27-last", f"best/{next((expected / 'best').iterdir()).name}"):
        ours, theirs = (open_checkpoint(one / part).weights for one in (directory, expected))
        for tensor in theirs.names():
            assert torch.equal(ours.tensor(tensor), theirs.tensor(tensor)), (part, tensor)


def straight_and_killed(models: str, out: str) -> None:
    train_once(models, f"{out}/straight", {})
    train_once(models, f"{out}/killed", {}, (7, None))


def resumed_and_broken(models: str, out: str) -> list[str]:
    from nemo_minitron.distillation.language_model import LanguageModel

    found = [train_once(models, f"{out}/killed", {})]
    # there is nothing left to do, and nothing is done
    found.append(train_once(models, f"{out}/killed", {}, (1, None)))
    configure = LanguageModel.configure_model

    def broken(self: Any, vp_stage: int | None = None) -> None:
        configure(self, vp_stage)
        next(self.parameters()).register_hook(lambda gradient: gradient / 0)

    LanguageModel.configure_model = broken  # type: ignore[method-assign]
    return [*found, train_once(models, f"{out}/broken", {})]


@pytest.mark.slow
def test_a_killed_training_goes_on_exactly(models: Path, tmp_path: Path) -> None:
    """Killed after step 7, with a checkpoint of step 6, in the middle of a pass: the next 21 steps, bit for bit."""
    arguments = {"models": str(models), "out": str(tmp_path)}
    with pytest.raises(FileNotFoundError, match="result0"):  # it never came to return
        run_distributed(straight_and_killed, 1, tmp_path, timeout=200, **arguments)
    assert [path.name for path in (tmp_path / "killed/checkpoints").iterdir()] == ["step=5-last"]
    resumed, again, broken = run_distributed(resumed_and_broken, 1, tmp_path, timeout=200, **arguments)[0]
    assert (resumed, again) == ("", "")
    assert_equal(tmp_path / "killed", tmp_path / "straight")

    measured = lines(tmp_path / "straight")
    training = [line for line in measured if "split" not in line]
    validations = [line for line in measured if "split" in line]
    assert [line["step"] for line in training] == list(range(1, STEPS + 1))
    assert [line["step"] for line in validations] == [12, 24, STEPS]
    best = min(validations, key=lambda line: line["kl"])
    (kept,) = (tmp_path / "straight/best").iterdir()
    assert kept.name == f"step={best['step'] - 1}-val_kl={best['kl']:.8f}"
    line = json.loads((tmp_path / "straight/metrics.jsonl").read_text().splitlines()[0])
    assert line["tflops"] > 0
    assert 1e7 < line["memory"] < 1e11
    assert line["tokens_per_second"] > 0

    assert broken.startswith("NonFiniteError: a gradient of step 0 is not finite; nothing was updated")
    assert lines(tmp_path / "broken") == []
    assert not list((tmp_path / "broken/checkpoints").glob("*"))


def preempted(models: str, out: str, layout: dict[str, Any]) -> list[str]:
    order = signal.SIGTERM if layout.get("tensor") else signal.SIGUSR1
    before = signal.getsignal(order)
    found = [train_once(models, f"{out}/straight", layout)]
    # once between validations, once where one is due
    found += [train_once(models, f"{out}/preempted", layout, (step, order)) for step in (7, 12)]
    assert signal.getsignal(order) == before
    return [*found, train_once(models, f"{out}/preempted", layout)]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2, "virtual_pipeline": 2}], ids=str)
def test_a_preempted_training_goes_on_exactly(layout: dict[str, Any], models: Path, tmp_path: Path) -> None:
    """The signal comes to one rank; all end their step and save."""
    ranks = run_distributed(preempted, 2, tmp_path, timeout=280, models=str(models), out=str(tmp_path), layout=layout)
    for found in ranks:
        stopped = "PreemptedError: stopped by a signal after step {} of 28: its state is saved. " + (
            "The same command goes on from there"
        )
        assert found == ["", stopped.format(7), stopped.format(12), ""]
    assert_equal(tmp_path / "preempted", tmp_path / "straight")
