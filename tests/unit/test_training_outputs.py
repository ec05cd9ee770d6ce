"""What a training left is told from names; a checkpoint that NeMo marks is none."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.distillation.training.outputs import Trained, finished, remove_unfinished


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)


def test_finished_is_the_last_step_alone(tmp_path):
    assert finished(tmp_path, 10) is None
    make(tmp_path, "checkpoints/step=7-last")
    assert finished(tmp_path, 10) is None
    make(tmp_path, "checkpoints/step=9-last")
    assert finished(tmp_path, 10) == Trained(tmp_path / "checkpoints/step=9-last")


def test_the_best_is_that_of_the_lowest_value(tmp_path):
    make(tmp_path, "checkpoints/step=9-last", "best/step=3-val_kl=0.25000000", "best/step=9-val_kl=0.12500000")
    trained = finished(tmp_path, 10)
    assert trained is not None
    assert trained.best == tmp_path / "best/step=9-val_kl=0.12500000"


def test_what_is_marked_does_not_count_and_is_removed(tmp_path):
    make(tmp_path, "checkpoints/step=9-last")
    (tmp_path / "checkpoints/step=9-last-unfinished").touch()
    assert finished(tmp_path, 10) is None
    remove_unfinished(tmp_path / "checkpoints")
    assert list((tmp_path / "checkpoints").iterdir()) == []
