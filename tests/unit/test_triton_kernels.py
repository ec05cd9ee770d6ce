"""The Triton losses in Triton's interpreter, and compiled for GPUs; who chooses them, and what happens without them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_minitron.distillation.losses import triton_choice
from nemo_minitron.errors import ConfigError

SUPPORT = Path(__file__).parents[1] / "support"
#: Errors as parts of the largest entry. Values are float32 whatever the logits are; gradients are rounded to the
#: logits' dtype, which in bfloat16 the interpreter does by cutting off.
VALUE = 1e-6
GRADIENT = {"float32": 3e-6, "float16": 5e-4, "bfloat16": 8e-3}

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed (torch's builds with CUDA bring it, the CPU builds do not)",
)


def program(name: str, **variables: str) -> Any:
    """What a program prints as JSON."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [sys.executable, "-P", str(SUPPORT / name)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
@pytest.mark.slow
@pytest.mark.smoke  # for the second environment, which alone has Triton
def test_values_and_gradients_in_the_interpreter() -> None:
    """Both KLs in three dtypes, odd vocabularies, temperatures, in place, padding, of half a vocabulary beside the
    other half (tensor parallelism of 2), with labels, common ids and masked tokens, and the output layer in chunks.
    """
    parts = program("triton_cases.py", TRITON_INTERPRET="1")
    assert [len(parts[name]) for name in ("against_float64", "of_two_ranks", "against_plain")] == [48, 24, 34]
    wrong = [
        f"{name}: {what} by {error:.1e}"
        for part in ("against_float64", "of_two_ranks", "against_plain")
        for name, errors in parts[part].items()
        for what, error in errors.items()
        if not error <= (VALUE if what == "value" else GRADIENT[name.split()[0]])
    ]
    assert not wrong
    for part in ("against_float64", "of_two_ranks", "against_plain"):
        calls = parts[f"calls of {part}"]
        assert min(calls.values()) >= 18, "the plain form stood in"


@needs_triton
@pytest.mark.slow
@pytest.mark.smoke  # for the second environment, which alone has Triton
def test_the_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """To machine code for Ampere, Hopper and Blackwell, which needs no GPU."""
    sizes = program("triton_compiled.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert len(sizes) == 8 and min(sizes.values()) > 0


@pytest.fixture(autouse=True)
def _untried() -> Any:
    triton_choice._tried.cache_clear()
    yield
    triton_choice._tried.cache_clear()


ROWS = torch.zeros(2, 8)


def test_logits_on_the_cpu_take_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "0"):
        monkeypatch.setenv("MINITRON_TRITON", value)
        assert triton_choice.triton_kernels(ROWS, None) is None
    monkeypatch.delenv("MINITRON_TRITON")
    assert triton_choice.triton_kernels(ROWS) is None
    assert "nemo_minitron.distillation.losses.triton_kernels" not in sys.modules


def test_other_values_of_the_variable_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRON_TRITON", "yes")
    with pytest.raises(ConfigError, match="MINITRON_TRITON=yes: must be 0 or 1"):
        triton_choice.triton_kernels(ROWS)


def test_insisting_where_it_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRON_TRITON", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=r"MINITRON_TRITON=1: (Triton is not installed|.*its interpreter).*unset it"):
        triton_choice.triton_kernels(ROWS)


@pytest.mark.parametrize("rows", [ROWS.double(), torch.zeros(8, 2).t()], ids=["float64", "columns apart"])
def test_what_the_kernels_cannot_take_goes_to_the_plain_form(
    monkeypatch: pytest.MonkeyPatch, rows: torch.Tensor
) -> None:
    monkeypatch.setenv("MINITRON_TRITON", "1")
    assert triton_choice.triton_kernels(ROWS.to(rows.dtype), rows) is None


def plain_statistics(p: torch.Tensor, q: torch.Tensor, *, temperature: float, reverse: bool = False) -> Any:
    z_p, z_q = p / temperature, q / temperature
    maxima = torch.stack([z_p.amax(-1), z_q.amax(-1)])
    exp_p, exp_q = (z_p - maxima[0][:, None]).exp(), (z_q - maxima[1][:, None]).exp()
    cross = exp_q * (z_q - z_p) if reverse else exp_p * (z_p - z_q)
    return maxima, torch.stack([exp_p.sum(-1), exp_q.sum(-1), cross.sum(-1)])


def plain_derivative(
    p: torch.Tensor, q: torch.Tensor, out: torch.Tensor, maxima: torch.Tensor, scales: torch.Tensor, *,
    temperature: float, means: torch.Tensor | None = None,
) -> None:  # fmt: skip
    z_p, z_q = p / temperature, q / temperature
    of_p, of_q = (s[:, None] * (z - m[:, None]).exp() for s, z, m in zip(scales, (z_p, z_q), maxima, strict=True))
    out.copy_(of_q - of_p if means is None else of_q * (z_q - z_p - means[:, None]))


def half_as_large(*arguments: Any, **options: Any) -> Any:
    maxima, sums = plain_statistics(*arguments, **options)
    return maxima, sums / 2


def without_a_compiler(*arguments: Any, **options: Any) -> Any:
    raise RuntimeError("Failed to find C compiler")


@pytest.mark.parametrize(
    ("statistics", "fault"),
    [
        (plain_statistics, None),
        (half_as_large, "its numbers are wrong: sums by 5.0e-01"),
        (without_a_compiler, "Triton failed with RuntimeError: Failed to find C compiler"),
    ],
    ids=["right", "wrong numbers", "fails"],
)
def test_the_kernels_are_tried_before_use(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, statistics: Any, fault: str | None
) -> None:
    """Once for a device, with functions of torch in the place of kernels."""
    stood_in = SimpleNamespace(BLOCK=64, statistics=statistics, derivative=plain_derivative)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    imports = SimpleNamespace(
        import_module=lambda name: stood_in, util=SimpleNamespace(find_spec=lambda name: stood_in)
    )
    monkeypatch.setattr(triton_choice, "importlib", imports)
    monkeypatch.setenv("MINITRON_TRITON", "1")
    if fault is None:
        assert triton_choice.triton_kernels(ROWS) is triton_choice.triton_kernels(ROWS) is stood_in
        assert not caplog.records
        return
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"MINITRON_TRITON=1: {fault}.*unset it"):
            triton_choice.triton_kernels(ROWS)
    (record,) = caplog.records
    assert "losses on cpu are computed by plain torch" in record.getMessage() and fault in record.getMessage()
    assert "MINITRON_TRITON=0" in record.getMessage()
