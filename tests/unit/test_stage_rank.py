"""What rank 0 of a stage under a cluster's launcher decides before the others start."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from nemo_minitron.config import DistillConfig, PruneConfig, load
from nemo_minitron.config.parts import TargetConfig
from nemo_minitron.jobs.output import Output, archived_outputs
from nemo_minitron.jobs.slurm_rank import _prepare


def test_a_stage_that_is_made_again_tells_its_ranks(tmp_path: Path) -> None:
    output, folder = tmp_path / "pruned", tmp_path / "logs"

    def config(layers: int) -> PruneConfig:
        target = TargetConfig(num_layers=layers)
        return PruneConfig(name="pruned", output=str(output), model="m", method="random", target=target)

    output.mkdir()
    record = Output(config(3)).finish({}, 1.0)
    Output(config(2)).write_settings(folder)
    with ExitStack() as replaced:
        assert _prepare(Output(config(2)), folder, True, replaced) == "run"
        assert load("prune", folder / "config.yaml").overwrite is True
        assert _prepare(Output(config(3)), folder, False, replaced) == "done before"
        assert _prepare(Output(config(2)), folder, False, replaced) == "run"
        assert load("prune", folder / "config.yaml").overwrite is False
    assert [path.name for path in archived_outputs(output)] == [f"pruned@{record['hash'][:12]}"]


def test_a_job_that_is_queued_again_goes_on_with_what_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, folder = tmp_path / "distilled", tmp_path / "logs"
    config = DistillConfig(name="distilled", output=str(output), student="s", teacher="t", overwrite=True)
    output.mkdir()
    (output / "old").touch()
    Output(dataclasses.replace(config, steps=7)).finish({}, 1.0)
    Output(config).write_settings(folder)
    with pytest.raises(KeyboardInterrupt), ExitStack() as first:
        assert _prepare(Output(config), folder, False, first) == "run"
        assert not output.exists(), "what other settings made is to be replaced"
        (output / "checkpoints").mkdir(parents=True)
        raise KeyboardInterrupt  # the job runs out of time
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with ExitStack() as again:
        assert _prepare(Output(config), folder, False, again) == "run"
        assert (output / "checkpoints").is_dir()
        assert yaml.safe_load((folder / "config.yaml").read_text())["overwrite"] is False
