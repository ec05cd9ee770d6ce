"""Reconstruction on two processes that share the samples: the tensors of one process."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_distributed
from support.mixture import random_mixture
from support.pruning import SHAPE, one_process, random_checkpoint, tokens

from nemo_minitron.axes import KeptUnits


def refit_all(groups: Any) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors that are replaced, by model."""
    from nemo_minitron.config import BlockConfig
    from nemo_minitron.pruning import prune_weights
    from nemo_minitron.reconstruction import reconstruct
    from nemo_minitron.streamed import StreamedModel

    dense = KeptUnits.everything(SHAPE)
    neurons = tuple(range(25))
    mixture = KeptUnits.everything(random_mixture().shape)
    kept = {
        "dense": dataclasses.replace(
            dense,
            layers=(0, 1, 3),
            ffn=(neurons,) * 3,
            hidden=tuple(range(20)),
            heads=dense.heads[:3],
            groups=dense.groups[:3],
        ),
        "mixture": dataclasses.replace(mixture, hidden=mixture.hidden[:-4]),
    }
    kept |= {f"{name}, block": units for name, units in kept.items()}
    teachers = {"dense": random_checkpoint(), "mixture": random_mixture()}
    changed: dict[str, dict[str, torch.Tensor]] = {}
    for name in kept:
        teacher = teachers[name.split(",")[0]]
        changed[name] = {}
        pruned = prune_weights(teacher, kept[name])
        reconstruct(
            StreamedModel(teacher, groups),
            StreamedModel(pruned, groups),
            kept[name],
            tokens(23, 13),  # odd: one rank has one sample more
            sink=lambda number, tensors, report, name=name: changed[name].update(tensors),
            micro_batch_size=3,
            block=BlockConfig(steps=8, learning_rate=5e-4) if "block" in name else None,
        )
    return changed


def case() -> dict[str, dict[str, torch.Tensor]]:
    from nemo_minitron.runtime.groups import ParallelLayout, initialize

    return refit_all(initialize(ParallelLayout(data=2)))


@pytest.mark.slow
def test_two_processes_refit_as_one_does(tmp_path: Path) -> None:
    with one_process() as groups:
        expected = refit_all(groups)
    assert len(expected["dense"]) > 10
    trained = [
        not torch.equal(tensor, expected[model].get(name, tensor))
        for model in ("dense", "mixture")
        for name, tensor in expected[f"{model}, block"].items()
    ]
    assert any(trained)
    for found in run_distributed(case, 2, tmp_path):
        for model, tensors in expected.items():
            assert found[model].keys() == tensors.keys()
            for name, tensor in tensors.items():
                torch.testing.assert_close(
                    found[model][name], tensor, rtol=1e-4, atol=1e-6, msg=lambda m, at=f"{model} {name}": f"{at}: {m}"
                )
