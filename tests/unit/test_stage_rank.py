"""What rank 0 of a stage under a cluster's launcher decides before the others start."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from nemo_minitron.config import PruneConfig, load
from nemo_minitron.config.parts import TargetConfig
from nemo_minitron.stages.base import write_record
from nemo_minitron.stages.execute import write_settings
from nemo_minitron.stages.rank import _prepare


def test_a_stage_that_is_made_again_tells_its_ranks(tmp_path: Path) -> None:
    output, folder = tmp_path / "pruned", tmp_path / "logs"

    def config(layers: int) -> PruneConfig:
        target = TargetConfig(num_layers=layers)
        return PruneConfig(name="pruned", output=str(output), model="m", method="random", target=target)

    output.mkdir()
    write_record(output, "prune", config(3), {}, 1.0)
    write_settings(config(2), folder)
    with ExitStack() as replaced:
        assert _prepare(config(2), folder, False, replaced).startswith("refused: stage pruned")
        assert load("prune", folder / "config.yaml").overwrite is False
        assert _prepare(config(2), folder, True, replaced) == "run"
        assert load("prune", folder / "config.yaml").overwrite is True
        assert _prepare(config(3), folder, False, replaced) == "done before"
