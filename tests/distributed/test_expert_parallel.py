"""Mixtures whose experts are shared out over two ranks, against one process.

Scores under this and larger layouts are in ``test_scoring_parallel.py``, beside those of the other layouts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import hf_logits, load_with_megatron
from support.distributed import run_distributed
from support.families import SIZES, family_model, some_units
from support.pruning import live, one_process, tokens
from support.training import measured, train

pytestmark = pytest.mark.slow

FAMILIES = ("mixtral", "qwen3_moe")
LAYOUT = {"data": 2, "expert": 2}
BESIDE_TENSOR = {"data": 2, "expert": 2, "tensor": 2, "sequence_parallel": True}
IDS = tokens(4, 12, vocab=SIZES["vocab_size"]).clamp(min=3)
SHORT: dict[str, Any] = {"count": 12, "steps": 3, "validate_every": 3}


def fewer_experts(shape: Any) -> Any:
    """Units that stay: in one layer both experts of the second rank, in the other one of each."""
    kept = some_units(shape)
    assert kept.expert_ffn is not None
    return dataclasses.replace(
        kept, experts=((2, 3), (0, 2)), expert_ffn=tuple(neurons[:2] for neurons in kept.expert_ffn)
    )


def gradients_of(chunk: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a fixed combination of the logits, by canonical name."""
    from nemo_minitron.checkpoints.live import canonical_parameters

    weights = torch.randn(12, 256, generator=torch.Generator().manual_seed(2)).double()
    chunk.eval().zero_grad()
    logits = chunk(ids, torch.arange(12).expand_as(ids), None)
    (logits * weights * ids[..., None]).sum().backward()
    return {name: parameter.grad for name, parameter in canonical_parameters(chunk)}


def plain_case(folder: str) -> dict[str, Any]:
    """Of each family: this rank's logits, gradients of the whole batch, and how live and offline pruning differ."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.checkpoints.formats.torch_dist.writer import write_torch_dist
    from nemo_minitron.errors import ShapeError
    from nemo_minitron.pruning import DepthPrune, WidthPrune, prune_weights
    from nemo_minitron.runtime.groups import ParallelLayout, initialize
    from nemo_minitron.runtime.model import build_model

    groups = initialize(ParallelLayout(**LAYOUT))
    found: dict[str, Any] = {}
    for family in FAMILIES:
        checkpoint = open_checkpoint(Path(folder, family))
        (chunk,) = live(checkpoint, groups)
        mine = IDS[2 * groups.dp_rank : 2 * groups.dp_rank + 2]
        with torch.no_grad():
            logits = chunk.eval()(mine, torch.arange(12).expand_as(mine), None)

        (wide,) = live(checkpoint, groups, dtype=torch.float64)
        gradients = gradients_of(wide, mine)
        for name, gradient in gradients.items():
            if "local_experts" not in name:
                dist.all_reduce(gradient, group=groups.dp)

        saved = Path(folder, f"{family}-saved")
        if groups.is_main:
            saved.mkdir()
            write_torch_dist(
                checkpoint, Path(folder, f"{family}-ours"), prefix="module.", dtype="float32", vocab_rows=256, common={}
            )
        dist.barrier()
        dist_checkpointing.save(chunk.sharded_state_dict(prefix="module."), str(saved))
        (loaded,) = build_model(checkpoint.shape, checkpoint.architecture, groups)
        load_with_megatron(Path(folder, f"{family}-ours"), [loaded])
        differences = [
            f"loaded {name}"
            for (name, one), other in zip(loaded.named_parameters(), chunk.parameters(), strict=True)
            if not torch.equal(one, other)
        ]

        kept = fewer_experts(checkpoint.shape)
        (built,) = live(prune_weights(checkpoint, kept), groups)
        WidthPrune(kept, groups=groups)(DepthPrune(kept, groups=groups)(chunk))
        ours, theirs = dict(chunk.named_parameters()), dict(built.named_parameters())
        differences += sorted(ours.keys() ^ theirs.keys())
        differences += [name for name in ours.keys() & theirs.keys() if not torch.equal(ours[name], theirs[name])]
        with torch.no_grad():
            pruned = chunk.eval()(mine, torch.arange(12).expand_as(mine), None)
        refused = ""
        try:
            WidthPrune(some_units(checkpoint.shape), groups=groups)(DepthPrune(kept, groups=groups)(loaded))
        except ShapeError as error:
            refused = str(error)
        found[family] = {
            "logits": logits, "gradients": gradients, "differences": differences, "pruned": pruned, "refused": refused,
        }  # fmt: skip
    return found


def test_a_model_whose_experts_are_shared_out(tmp_path: Path) -> None:
    """Logits, gradients, checkpoints of Megatron's and ours, live pruning: one forward for two ranks' tokens."""
    from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
    from nemo_minitron.checkpoints.formats.torch_dist.reader import TorchDist, TorchDistWeights
    from nemo_minitron.pruning import prune_weights

    for family in FAMILIES:
        family_model(family, tmp_path / family)
    ranks = run_distributed(plain_case, 2, tmp_path, folder=str(tmp_path))
    with one_process() as groups:
        for family in FAMILIES:
            checkpoint = open_checkpoint(tmp_path / family)
            pruned = prune_weights(checkpoint, fewer_experts(checkpoint.shape))
            write_checkpoint(pruned, tmp_path / f"{family}-pruned", "hf")
            (chunk,) = live(checkpoint, groups, dtype=torch.float64)
            expected, held = gradients_of(chunk, IDS), set()
            for number, rank in enumerate(result[family] for result in ranks):
                assert rank["differences"] == [], family
                assert "num_moe_experts=3 cannot be shared out over parallel.expert=2" in rank["refused"]
                for found, folder in ((rank["logits"], family), (rank["pruned"], f"{family}-pruned")):
                    logits = hf_logits(tmp_path / folder, IDS[2 * number : 2 * number + 2])
                    assert (found[..., :131] - logits).abs().max() <= 1e-4 * logits.abs().max()
                held |= rank["gradients"].keys()
                for name, gradient in rank["gradients"].items():
                    # the router's softmax is in float32
                    torch.testing.assert_close(
                        gradient, expected[name], rtol=1e-5, atol=1e-5 * expected[name].abs().max().item()
                    )
                assert len([name for name in rank["gradients"] if "layers.0.mlp.experts" in name]) == 2 * 2
            assert held == expected.keys()
            weights = TorchDistWeights(TorchDist(tmp_path / f"{family}-saved"), checkpoint.shape, family, "module.")
            weights.check()
            for name in checkpoint.weights.names():
                assert torch.equal(weights.tensor(name), checkpoint.weights.tensor(name)), name


@contextlib.contextmanager
def slow_first_rank() -> Iterator[None]:
    """The first rank waits before it takes away NeMo's marker of an unfinished checkpoint, as on a loaded machine."""
    from nemo.lightning.pytorch.callbacks import ModelCheckpoint

    remove = ModelCheckpoint.remove_checkpoint_unfinished_marker

    def late(path: Any, barrier_before: bool = False) -> None:
        if barrier_before:
            torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            time.sleep(2)
        remove(path)

    ModelCheckpoint.remove_checkpoint_unfinished_marker = staticmethod(late)
    try:
        yield
    finally:
        ModelCheckpoint.remove_checkpoint_unfinished_marker = staticmethod(remove)


def training_case(folder: str, out: str, layout: dict[str, Any]) -> None:
    for family in FAMILIES:
        models = f"{folder}/{family}"
        assert train(models, f"{out}/{family}-labels", alone=True, layout=layout, **SHORT) == ""
        assert train(models, f"{out}/{family}-distilled", layout=layout, **SHORT) == ""
    if layout != LAYOUT:
        return
    with slow_first_rank():
        stopped = train(models, f"{out}/resumed", alone=True, layout=layout, at=(2, signal.SIGTERM), **SHORT)
    assert "stopped by a signal after step 2 of 3" in stopped
    error = train(models, f"{out}/resumed", alone=True, layout=layout, **SHORT)
    assert error == "", error


def test_trainings_equal_one_process(tmp_path: Path) -> None:
    """Losses and gradient norms of every step, and the weights of the last checkpoint, which NeMo wrote under EP."""
    from nemo_minitron.checkpoints import open_checkpoint

    for family in FAMILIES:
        own = {"router_aux_loss_coef": 0.01, "num_hidden_layers": 2}
        family_model(family, tmp_path / family / "teacher", seed=1, **own)
        family_model(family, tmp_path / family / "student", seed=2, hidden_size=36, **own)
    for name, world, layout in (("one", 1, {}), ("two", 2, LAYOUT), ("four", 4, BESIDE_TENSOR)):
        (tmp_path / name).mkdir()
        case = {"folder": str(tmp_path), "out": str(tmp_path / name), "layout": layout}
        run_distributed(training_case, world, tmp_path / name, timeout=290, **case)
    for name, family in itertools.product(("two", "four"), FAMILIES):
        for kind in ("labels", "distilled"):
            one, two = (tmp_path / place / f"{family}-{kind}" for place in ("one", name))
            lines = list(zip(measured(one), measured(two), strict=True))
            assert len(lines) == 4
            for expected, found in lines:
                numbers = {key: value for key, value in expected.items() if key != "split"}
                assert {key: found[key] for key in numbers} == pytest.approx(numbers, rel=1e-4)
            last = "checkpoints/step=2-last"
            weights, trained = (open_checkpoint(place / last).weights for place in (one, two))
            start = open_checkpoint(tmp_path / family / ("teacher" if kind == "labels" else "student")).weights
            for tensor in weights.names():
                before, after = start.tensor(tensor), weights.tensor(tensor)
                moved = (after[: len(before)] - before).abs().max()
                assert moved > 1e-4
                # the rows of the vocabulary's padding are as many as the layout asks for
                difference = (trained.tensor(tensor)[: len(before)] - after[: len(before)]).abs().max()
                # Adam's first steps divide small gradients by themselves
                assert difference <= 0.05 * moved, (name, family, kind, tensor)
    # the optimizer's state of experts goes through a checkpoint as well
    straight, resumed = (tmp_path / "two" / name for name in ("qwen3_moe-labels", "resumed"))
    assert measured(resumed) == measured(straight)
    one, two = (open_checkpoint(place / "checkpoints/step=2-last").weights for place in (straight, resumed))
    for name in one.names():
        assert torch.equal(one.tensor(name), two.tensor(name)), name
