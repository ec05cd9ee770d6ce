"""``minitron iterate`` in parallel layouts: the rounds of one process, which another layout goes on with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import tiny_checkpoint
from support.distributed import run_distributed
from support.pruning import one_process
from support.text import write_jsonl

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2-sp": {"tensor": 2, "sequence_parallel": True},
    "pp2": {"pipeline": 2},
}


def config(home: Path, name: str) -> Any:
    """3 layers, 76 neurons, 48 channels in two equal steps to 2, 36, 30."""
    from nemo_minitron.config import DataConfig, IterateConfig, ParallelLayout, SourceConfig, TargetConfig

    return IterateConfig(
        model=str(home / "model"),
        output=str(home / name),
        target=TargetConfig(num_layers=2, ffn_hidden_size=36, hidden_size=30, num_attention_heads=4),
        rounds=2,
        spacing="linear",
        data=DataConfig(
            sources=[SourceConfig(name="text", path=str(home / "text.jsonl"))],
            sequence_length=16,
            calibration_fraction=0.3,
            cache_dir=str(home / "cache"),
        ),
        samples=4,
        micro_batch_size=2,
        format="hf",
        parallel=ParallelLayout(**LAYOUTS.get(name.removeprefix("again-"), {})),
    )


def iterate_case(home: Path) -> dict[str, int]:
    from nemo_minitron.stages import iterate

    return {
        name: iterate.run(config(home, name))["resumed"] for layout in LAYOUTS for name in (layout, f"again-{layout}")
    }


@pytest.mark.slow
def test_rounds_do_not_depend_on_the_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_minitron.pruning import load_kept
    from nemo_minitron.stages import iterate
    from nemo_minitron.stages.shared import iterate_rounds

    tiny_checkpoint(tmp_path / "model")
    words = torch.randint(0, 125, (60, 30), generator=torch.Generator().manual_seed(0)).tolist()
    write_jsonl(tmp_path / "text.jsonl", [" ".join(f"w{number}" for number in row) for row in words])
    with one_process():
        iterate.run(config(tmp_path, "one"))
    score = iterate_rounds._score

    def stopped(config: Any, checkpoint: Any, *rest: Any) -> Any:
        if checkpoint.shape.hidden_size < 48:
            raise KeyboardInterrupt
        return score(config, checkpoint, *rest)

    monkeypatch.setattr(iterate_rounds, "_score", stopped)
    for name in LAYOUTS:  # one process begins, the layout goes on
        alone = dataclasses.replace(config(tmp_path, f"again-{name}"), parallel=config(tmp_path, "one").parallel)
        with one_process(), pytest.raises(KeyboardInterrupt):
            iterate.run(alone)
    for found in run_distributed(iterate_case, 2, tmp_path, home=tmp_path):
        assert found == {name: int(name.startswith("again-")) for name in found}
    expected = load_kept(tmp_path / "one" / "kept.json")
    for name in LAYOUTS:
        assert load_kept(tmp_path / name / "kept.json") == expected, name
        assert load_kept(tmp_path / f"again-{name}" / "kept.json") == expected, name
