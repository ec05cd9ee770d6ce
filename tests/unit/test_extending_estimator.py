"""The estimator of docs/extending.md, from a package outside: scored by, saved, pruned by, on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import tiny_checkpoint
from support.extending import install_example
from support.pruning import SHAPE, live, one_process, random_checkpoint, tokens
from support.text import write_jsonl

from nemo_minitron.config import DataConfig, IterateConfig, PruneConfig, ScoreConfig, SourceConfig, TargetConfig
from nemo_minitron.config.tables import Table
from nemo_minitron.importance import Scores, score_model
from nemo_minitron.importance.estimators import ESTIMATORS
from nemo_minitron.pruning import load_kept
from nemo_minitron.stages import iterate, prune, score

NAME = "log_activation"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages that has the example."""
    folder = tmp_path_factory.mktemp("site-packages")
    install_example("An importance estimator", folder)
    return folder


@pytest.fixture
def estimators(package: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Table[Any]]:
    """The table in a process that can import the example: registered, as a script does it."""
    monkeypatch.syspath_prepend(package)
    import log_activation_entry  # the module of the page

    ESTIMATORS.register(log_activation_entry.LOG_ACTIVATION)
    yield ESTIMATORS
    ESTIMATORS.unregister(NAME)


def test_scores_are_what_the_recorder_says(estimators: Table[Any]) -> None:
    blocks = tokens(5, 9)
    seen: dict[int, list[torch.Tensor]] = {}
    with one_process() as groups:
        chunks = live(random_checkpoint(), groups, dtype=torch.float64)
        for index, layer in enumerate(chunks[0].decoder.layers):
            layer.mlp.linear_fc2.register_forward_pre_hook(
                lambda module, args, index=index: seen.setdefault(index, []).append(args[0])
            )
        scores = score_model(chunks, blocks, groups, shape=SHAPE, micro_batch_size=2, estimator=NAME, batch="max")
    assert (scores.estimator, scores.sequence, scores.batch) == (NAME, "mean", "max")
    # [L, s, b, F]; of six samples the last fills up the micro-batch
    activations = torch.stack([torch.cat(seen[layer], 1)[:, : len(blocks)] for layer in sorted(seen)])
    torch.testing.assert_close(scores.ffn, activations.abs().log1p().mean(1).amax(1), rtol=1e-6, atol=0)


def test_stages_score_save_and_prune_by_it(estimators: Table[Any], tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model")
    words = torch.randint(0, 125, (60, 30), generator=torch.Generator().manual_seed(0)).tolist()
    write_jsonl(tmp_path / "text.jsonl", [" ".join(f"w{number}" for number in row) for row in words])
    data = DataConfig(
        sources=[SourceConfig(name="text", path=str(tmp_path / "text.jsonl"))],
        sequence_length=16,
        calibration_fraction=0.3,
        cache_dir=str(tmp_path / "cache"),
    )
    given: dict[str, Any] = {"model": str(tmp_path / "model"), "data": data, "samples": 8}
    target = TargetConfig(ffn_hidden_size=40)
    with one_process():
        record = score.run(ScoreConfig(**given, output=str(tmp_path / "scores"), estimator=NAME))
        score.run(ScoreConfig(**given, output=str(tmp_path / "plain")))
        iterate.run(
            IterateConfig(
                **given, output=str(tmp_path / "iterated"), estimator=NAME, target=target, rounds=1, format="hf"
            )
        )
    assert (record["estimator"], record["criteria"]) == (NAME, ["mean-l2"])
    scores = Scores.load(tmp_path / "scores")
    assert scores.estimator == NAME

    pruned = PruneConfig(
        model=given["model"], scores=str(tmp_path / "scores"), method=NAME, target=target, format="hf",
        output=str(tmp_path / "pruned"),
    )  # fmt: skip
    assert pruned.faults() == []
    prune.run(pruned)
    kept = load_kept(tmp_path / "pruned" / "kept.json")[0]
    best = scores.ffn.topk(40, dim=-1).indices.sort(-1).values
    assert [list(layer) for layer in kept.ffn] == best.tolist()
    assert load_kept(tmp_path / "iterated" / "kept.json")[0] == kept
    assert kept.ffn != tuple(
        map(tuple, Scores.load(tmp_path / "plain").ffn.topk(40, dim=-1).indices.sort(-1).values.tolist())
    )
    assert json.loads((tmp_path / "pruned" / "minitron.json").read_text())["lineage"]["method"] == NAME


def test_the_command_line_knows_it_where_it_is_installed(package: Path, tmp_path: Path) -> None:
    def answer(*words: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, *words],
            capture_output=True,
            text=True,
            env=os.environ | {"COLUMNS": "300"} | environment,
        )
        return done.stdout + done.stderr

    settings = [f"output={tmp_path}/out", f"estimator={NAME}"]
    dry_run = ["-m", "nemo_minitron", "score", "score", "--dry-run", *settings]
    assert f"estimator={NAME}: must be one of activation, taylor, reconstruction, magnitude\n" in answer(*dry_run)
    installed = answer(*dry_run, PYTHONPATH=str(package))
    assert "calibration" in installed and "must be one of" not in installed
    assert f'"{NAME}"' in answer("-m", "nemo_minitron", "score", "--help", PYTHONPATH=str(package))

    code = (
        "import sys\n"
        "from nemo_minitron.config import load\n"
        f"print(load('score', 'score', {settings!r}).criteria(), 'log_activation_entry' in sys.modules, "
        "'torch' in sys.modules)"
    )
    assert answer("-c", code, PYTHONPATH=str(package)) == "[('mean', 'l2')] True False\n"
