"""``auto`` for precisions: what is chosen, that a run keeps it, and that the record states it."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_distributed

from nemo_minitron.config import CacheConfig, DistillConfig, EvaluateConfig, SearchConfig, SftConfig, StageConfig, load
from nemo_minitron.config.parts import RuntimeConfig
from nemo_minitron.jobs import precision as settling
from nemo_minitron.jobs.output import Output
from nemo_minitron.jobs.precision import automatic, with_values
from nemo_minitron.runtime import precision
from nemo_minitron.runtime.device import CPU, Device
from nemo_minitron.runtime.precision import Choice, choose

AMX = "processor\t: 0\nflags\t\t: fpu avx512f amx_bf16 amx_tile\nprocessor\t: 1\nflags\t\t: fpu\n"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Sets what the machine seems to be: its processor's features, and the seconds of a product by type."""

    def become(cpuinfo: str | None, float32: float = 1.0, bfloat16: float = 0.1) -> list[str]:
        path = tmp_path / "cpuinfo"
        if cpuinfo is not None:
            path.write_text(cpuinfo)
        asked: list[str] = []

        def product(dtype: torch.dtype) -> float:
            asked.append(str(dtype))
            return bfloat16 if dtype == torch.bfloat16 else float32

        monkeypatch.setattr(precision, "_CPUINFO", path)
        monkeypatch.setattr(precision, "_product", product)
        return asked

    return become


@pytest.mark.parametrize(("cpuinfo", "float32", "bfloat16", "taken", "reason"), [
    (AMX, 1.0, 0.2, True, r"amx_bf16; a product of .* took 1000 ms in float32 and 200 ms in bfloat16"),
    (AMX, 1.0, 0.8, False, r"amx_bf16; .* \(bfloat16 is taken from 1\.5 times the speed on\)"),
    (AMX.replace("amx_bf16", "avx512_bf16"), 1.5, 1.0, True, "avx512_bf16"),
    ("flags\t: fpu avx512f avx512_vnni\n", 1.0, 0.1, False, "neither AMX nor AVX512-BF16"),
    ("Features\t: fp asimd bf16\n", 1.0, 0.1, False, "neither"),
    (None, 1.0, 0.1, False, "neither"),
])  # fmt: skip
def test_bfloat16_is_taken_where_it_is_supported_and_faster(
    machine: Any, cpuinfo: str | None, float32: float, bfloat16: float, taken: bool, reason: str
) -> None:
    asked = machine(cpuinfo, float32, bfloat16)
    choice = choose(CPU)
    assert choice.bfloat16 is taken
    assert re.search(reason, choice.reason)
    assert bool(asked) == ("product" in choice.reason), "an unsupported type is not timed"


def test_the_products_are_timed_for_about_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(precision.time, "process_time", lambda: now[0])

    def slow(name: str) -> float:
        now[0] += 0.7
        return 0.7

    assert precision._times(slow, ("float32", "bfloat16")) == (0.7, 0.7)
    assert now[0] == pytest.approx(1.4), "one round took more than a second"


def test_the_real_product_runs() -> None:
    assert all(0 < precision._product(dtype) < 60 for dtype in (torch.float32, torch.bfloat16))


@pytest.mark.parametrize(("major", "taken"), [(7, False), (8, True), (9, True)])
def test_on_cuda_the_capability_decides(monkeypatch: pytest.MonkeyPatch, major: int, taken: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    assert choose(Device("cuda", 1)).bfloat16 is taken


def distilled(folder: Path, **changes: Any) -> DistillConfig:
    settings = {"output": str(folder / "distilled"), "student": "s", "teacher": "t", "precision": "auto", **changes}
    return DistillConfig(runtime=RuntimeConfig(dtype="auto"), **settings)


def start(config: StageConfig) -> StageConfig:
    """What the stage is run with."""
    output = Output(config)
    output.begin()
    return output.settled()


def test_a_run_takes_one_precision_keeps_it_and_the_record_states_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([Choice(True, "fast"), Choice(False, "slow"), Choice(False, "slower")])
    monkeypatch.setattr(precision, "choose", lambda device: next(answers))
    config = distilled(tmp_path)
    taken = start(config)
    assert isinstance(taken, DistillConfig)
    assert (taken.precision, taken.runtime.dtype) == ("bf16-mixed", "bfloat16")
    assert dataclasses.replace(taken, precision="auto", runtime=config.runtime) == config, "nothing else changes"
    assert config.precision == "auto"

    (tmp_path / "distilled").mkdir()
    resumed = start(config)
    assert resumed == taken, "a run that is resumed keeps what it took"
    other = start(dataclasses.replace(config, steps=7))
    assert isinstance(other, DistillConfig)
    assert other.precision == "32", "another run chooses anew"
    assert start(config) != taken, "the file is of the other run now"

    record = Output(config).finish({"steps": 1}, 1.0)
    assert (record["config"]["precision"], record["config"]["runtime"]["dtype"]) == ("32", "float32")
    assert record["precision"] == {"taken": {"runtime.dtype": "float32", "precision": "32"}, "reason": "slower"}
    assert record["settings"]["precision"] == "auto", "the identity is that of the settings as they were written"
    assert Output(config).state()[0] == "done"
    assert Output(dataclasses.replace(config, precision="32")).state()[0] == "changed"


def test_a_precision_that_is_given_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "choose", lambda device: pytest.fail("asked"))
    config = distilled(tmp_path, precision="bf16-mixed")
    config.runtime.dtype = "float32"
    assert start(config) is config
    (tmp_path / "distilled").mkdir()
    assert "precision" not in Output(config).finish({}, 1.0)


def test_a_damaged_file_of_what_was_taken_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "choose", lambda device: Choice(True, "fast"))
    config = distilled(tmp_path)
    (tmp_path / "distilled").mkdir()
    for content in ("", "[]", '{"identity": 1}', '{"identity": "", "taken": [], "reason": ""}'):
        start(config)
        (Output(config).folder / settling._FILE).write_text(content)
        assert start(config).runtime.dtype == "bfloat16"


def test_settings_that_can_be_left_to_the_suite() -> None:
    config = SearchConfig(runtime=RuntimeConfig(dtype="auto"))
    config.distill.precision = "auto"
    assert sorted(automatic(config)) == ["distill.precision", "runtime.dtype"]
    settled = with_values(config, {"distill.precision": "32", "runtime.dtype": "float32"})
    assert (settled.distill.precision, settled.runtime.dtype, config.distill.precision) == ("32", "float32", "auto")
    assert not [*automatic(SearchConfig())], "memory, device and others have an auto of their own"


@pytest.mark.parametrize("cls", [DistillConfig, EvaluateConfig, SftConfig, CacheConfig])
def test_auto_is_a_value_of_the_settings(cls: type[StageConfig], tmp_path: Path) -> None:
    config = cls(runtime=RuntimeConfig(dtype="auto"))
    assert not [fault for fault in config.runtime.faults() if "dtype" in fault]
    if hasattr(config, "precision"):
        config.precision = "auto"
        assert not [fault for fault in config.faults() if "precision" in fault]
        config.precision = "half"
        assert "precision=half: must be one of 32, bf16-mixed, auto" in config.faults()


def _settled_by_rank(folder: Path) -> tuple[str, str]:
    """Every rank would choose otherwise."""
    rank = int(os.environ["RANK"])
    precision.choose = lambda device: Choice(rank == 0, f"rank {rank}")  # type: ignore[assignment]
    config = distilled(folder)
    if rank == 0:
        Output(config).begin()
    settled = Output(config).settled()
    torch.distributed.init_process_group("gloo")  # it meets at the same address
    torch.distributed.barrier()
    assert isinstance(settled, DistillConfig)
    return settled.precision, settled.runtime.dtype


@pytest.mark.slow
def test_ranks_take_what_the_first_took(tmp_path: Path) -> None:
    assert run_distributed(_settled_by_rank, 2, tmp_path, folder=tmp_path) == [("bf16-mixed", "bfloat16")] * 2


def test_a_plan_and_its_time_know_the_setting(tmp_path: Path) -> None:
    from nemo_minitron.cli.expected_time import _alike
    from nemo_minitron.stages.shared.disk import _least

    config = distilled(tmp_path)
    record = Output(dataclasses.replace(config, precision="bf16-mixed")).finish({}, 1.0)
    assert _alike(config, record)
    assert not _alike(dataclasses.replace(config, precision="32"), record)
    assert (_least("auto"), _least("32")) == ("bf16-mixed", "32")


def test_the_setting_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "student: s\nteacher: t\noutput: o\nprecision: auto\nruntime: {dtype: auto}\n"
        "data: {sources: [{name: a, path: a.txt}]}\n"
    )
    config = load("distill", path)
    assert isinstance(config, DistillConfig)
    assert (config.precision, config.runtime.dtype) == ("auto", "auto")
