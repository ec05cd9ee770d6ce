"""A training that is made anew begins anew, and what it replaces is lost only when it is done."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import types
from pathlib import Path
from typing import Any

import pytest
from support.distributed import run_distributed

from nemo_minitron.config import ChatDataConfig, DistillConfig, LabelConfig, ParallelLayout
from nemo_minitron.errors import ConfigError, DataError, DiskError, PreemptedError
from nemo_minitron.jobs.atomic import MARKER
from nemo_minitron.jobs.output import Output, claim_output


@pytest.fixture
def output(tmp_path: Path) -> Path:
    path = tmp_path / "distilled"
    (path / "checkpoints" / "step=8-last").mkdir(parents=True)
    (path / "metrics.jsonl").write_text("old\n")
    return path


def config(output: Path, **settings: bool) -> DistillConfig:
    return DistillConfig(output=str(output), student="s", teacher="t", **settings)


def names(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir())


def test_overwrite_begins_with_nothing_and_ends_with_the_new(output: Path) -> None:
    with Output(config(output, overwrite=True)).replacing():
        assert not output.exists()
        output.mkdir()
        (output / "metrics.jsonl").write_text("new\n")
    assert (output / "metrics.jsonl").read_text() == "new\n"
    assert names(output) == ["distilled"]


def test_a_resume_finds_what_was_there(output: Path) -> None:
    with Output(config(output)).replacing():
        assert (output / "checkpoints" / "step=8-last").is_dir()
    assert names(output) == ["distilled"]


def test_a_refusal_costs_nothing(output: Path) -> None:
    with pytest.raises(DataError), Output(config(output, overwrite=True)).replacing():
        output.mkdir()
        (output / "metrics.jsonl").write_text("new\n")
        raise DataError("no text")
    assert (output / "metrics.jsonl").read_text() == "old\n"
    assert names(output) == ["distilled"]


@pytest.mark.parametrize("error", [PreemptedError("stopped"), RuntimeError("crashed")])
def test_what_can_be_gone_on_with_stays_and_so_does_the_old(output: Path, error: Exception) -> None:
    with pytest.raises(type(error)), Output(config(output, overwrite=True)).replacing():
        (output / "checkpoints").mkdir(parents=True)
        raise error
    assert names(output) == [".distilled.replaced", "distilled"]
    with Output(config(output)).replacing():  # the same stage again, to its end
        assert (output / "checkpoints").is_dir()
    assert names(output) == ["distilled"]


@pytest.mark.parametrize("saved", [False, True])
def test_a_full_disk(output: Path, saved: bool) -> None:
    """The old output comes back, unless the new training has saved a state, which can be gone on with."""
    with pytest.raises(DiskError), Output(config(output, overwrite=True)).replacing():
        output.mkdir()
        (output / "metrics.jsonl").write_text("new\n")
        if saved:
            (output / "checkpoints" / "step=4-last").mkdir(parents=True)
        raise DiskError("no space")
    assert (output / "metrics.jsonl").read_text() == ("new\n" if saved else "old\n")
    assert names(output) == ([".distilled.replaced"] if saved else []) + ["distilled"]


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.mkdir()
    (path / "thesis.tex").write_text("x")
    with (
        pytest.raises(ConfigError, match="was not written by minitron"),
        Output(config(path, overwrite=True)).replacing(),
    ):
        pass
    assert (path / "thesis.tex").read_text() == "x"


def test_an_output_of_its_own_is_marked_and_found_again(tmp_path: Path) -> None:
    stage = labelling(tmp_path)
    assert claim_output(stage) == tmp_path / "labels"
    (tmp_path / "labels" / "half").touch()
    claim_output(stage)
    assert listing(tmp_path / "labels") == [MARKER, "half"]
    with pytest.raises(ConfigError, match="already exists; choose another output or pass --overwrite"):
        claim_output(labelling(tmp_path, resume=False))
    # Also a stage that is told not to resume leaves the replacing to what is around it.
    with Output(labelling(tmp_path, resume=False, overwrite=True)).replacing():
        assert not claim_output(labelling(tmp_path, resume=False)).joinpath("half").exists()
    (tmp_path / "labels" / MARKER).unlink()
    (tmp_path / "labels" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="already exists"):
        claim_output(stage)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def labelling(folder: Path, **settings: Any) -> LabelConfig:
    return LabelConfig(
        output=str(folder / "labels"), reward=str(folder), data=ChatDataConfig(path=str(folder / "c.jsonl")), **settings
    )


def as_under_srun() -> None:
    """Replace what torchrun says of this process by what ``srun`` says."""
    rank, world = os.environ.pop("RANK"), os.environ.pop("WORLD_SIZE")
    os.environ |= {
        "SLURM_PROCID": rank, "SLURM_LOCALID": os.environ.pop("LOCAL_RANK"), "SLURM_NTASKS": world,
        "SLURM_STEP_NUM_TASKS": world, "SLURM_STEP_TASKS_PER_NODE": f"{os.environ.pop('LOCAL_WORLD_SIZE')}(x1)",
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost",
    }  # fmt: skip


def run_stages(folder: str, processes: int, srun: bool = False) -> list[Any]:
    """A stage on processes that are there: made, found, resumed, made anew, refused; what each rank saw in it."""
    import torch

    from nemo_minitron.jobs import in_place

    root, seen = Path(folder), []
    if srun:
        as_under_srun()

    def run(config: LabelConfig) -> dict[str, Any]:
        found = Path(config.output)
        seen.append(listing(found) if found.is_dir() else None)
        if processes > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        if processes > 1:
            torch.distributed.barrier()
        if int(os.environ.get("RANK", "0")):
            return {}
        claim_output(config).joinpath(f"made-{len(seen)}").touch()
        if config.batch == 13:
            raise DataError("batch=13")
        return {"conversations": len(seen)}

    in_place.stage_module = lambda stage: types.SimpleNamespace(run=run)  # type: ignore[assignment, return-value]
    for settings in ({}, {"resume": False}, {}, {"overwrite": True}, {"overwrite": True, "batch": 13}, {}):
        try:
            made = in_place.run_in_place(
                labelling(root, parallel=ParallelLayout(tensor=processes), **settings)  # type: ignore[arg-type]
            )
        except (ConfigError, DataError) as error:
            seen.append(str(error))
        else:
            assert made.get("conversations", len(seen)) == len(seen)
        if processes > 1:
            torch.distributed.barrier()
    return seen


def test_a_job_that_is_queued_again_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told to overwrite, it has done so in its first life."""
    from nemo_minitron.jobs import in_place, worker

    lives: list[list[str] | None] = []

    def run(config: LabelConfig) -> dict[str, Any]:
        lives.append(listing(Path(config.output)) if Path(config.output).exists() else None)
        claim_output(config).joinpath(f"life-{len(lives)}").touch()
        if len(lives) < 3:
            raise PreemptedError("the job's time is over")
        return {"lives": len(lives)}

    monkeypatch.setattr(in_place, "stage_module", lambda stage: types.SimpleNamespace(run=run))
    monkeypatch.setattr(worker, "set_up", lambda config: None)
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    stage = dataclasses.replace(labelling(tmp_path, overwrite=True), reward=str(tmp_path / "reward"))
    claim_output(labelling(tmp_path)).joinpath("old").touch()
    for restart in range(3):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        with contextlib.suppress(PreemptedError):
            assert in_place.run_in_place(stage) == {"lives": 3}
    assert lives == [None, [MARKER, "life-1"], [MARKER, "life-1", "life-2"]]


EXPECTED = [
    None,
    "output: {} already exists; choose another output or pass --overwrite",
    [MARKER, "made-1", "record.json"],
    None,
    None,
    "batch=13",
    [MARKER, "made-4", "record.json"],
]


def test_a_stage_in_place_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_minitron.jobs import in_place, worker

    monkeypatch.setattr(in_place, "stage_module", in_place.stage_module)
    monkeypatch.setattr(worker, "set_up", lambda config: None)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    told = [said.format(tmp_path / "labels") if isinstance(said, str) else said for said in EXPECTED]
    assert run_stages(str(tmp_path), 1) == told
    with pytest.raises(ConfigError, match="the layout makes 2 processes, 1 were started; give the executor as many"):
        in_place.run_in_place(labelling(tmp_path, parallel=ParallelLayout(tensor=2)))


@pytest.mark.slow
@pytest.mark.parametrize("srun", [False, True])
def test_a_stage_in_place_of_two_processes(tmp_path: Path, srun: bool) -> None:
    """No rank begins before the output is set aside, and what rank 0 refuses all refuse."""
    first, second = run_distributed(run_stages, 2, tmp_path, folder=str(tmp_path), processes=2, srun=srun)
    told = [said.format(tmp_path / "labels") if isinstance(said, str) else said for said in EXPECTED]
    assert first == told
    assert second == [said for said in told if said != "batch=13"]
