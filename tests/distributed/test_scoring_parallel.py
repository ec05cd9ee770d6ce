"""Scoring under every layout against one process: same scores by every estimator, same kept units, same errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_distributed
from support.mixture import MIXTURE, live_mixture
from support.pruning import SHAPE, live, one_process, random_checkpoint, tokens

# By the number of processes. 8 layers, so that there are two for each of 2 x 2 virtual stages; 7, so that stages are
# uneven (4 + 3, or 2 + 2 + 2 + 1); and a model of which 3 ranks hold a group each, or 2 + 1 + 1 layers.
WIDE = SHAPE.replace(num_layers=8)
THIRDS = SHAPE.replace(num_attention_heads=6, num_query_groups=3, ffn_hidden_size=42)
SHAPES = {2: WIDE.replace(num_layers=7), 3: THIRDS, 4: WIDE}
NAMES = ("ffn", "heads", "groups", "hidden", "layers")
BLOCKS = (7, 13)  # odd, so that the last micro-batch of a data-parallel rank is filled up

#: By the number of processes: layouts share a launch.
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "tp2": {"tensor": 2},
        "tp2-sp": {"tensor": 2, "sequence_parallel": True},
        "pp2": {"pipeline": 2},
        "pp2-vp2": {"pipeline": 2, "virtual_pipeline": 2},
        "dp2": {"data": 2},
        "dp2-ep2": {"data": 2, "expert": 2},
    },
    3: {"tp3": {"tensor": 3}, "tp3-sp": {"tensor": 3, "sequence_parallel": True}, "pp3": {"pipeline": 3}},
    4: {
        "tp2-pp2": {"tensor": 2, "pipeline": 2},
        "tp2-pp2-sp": {"tensor": 2, "pipeline": 2, "sequence_parallel": True},
        "tp2-dp2": {"tensor": 2, "data": 2},
        "tp2-dp2-ep2-sp": {"tensor": 2, "data": 2, "expert": 2, "sequence_parallel": True},
        "dp4-ep2": {"data": 4, "expert": 2},
        "pp2-dp2-ep2": {"pipeline": 2, "data": 2, "expert": 2},
        "pp2-dp2-vp2": {"pipeline": 2, "data": 2, "virtual_pipeline": 2},
    },
}
PAIRS = [("mean", "l2"), ("variance", "mean"), ("max", "variance"), ("l2", "max"), ("l1", "l1")]


def score_all(shape: Any, groups: Any) -> dict[str, Any]:
    """Scores by estimator, precision and amount of data. In float64, layouts differ by nothing but mistakes."""
    from nemo_minitron.importance import score_criteria, score_streamed
    from nemo_minitron.streamed import StreamedModel, streamed_faults

    options = {"shape": shape, "micro_batch_size": 2}
    narrow = live(random_checkpoint(shape), groups)
    wide = live(random_checkpoint(shape), groups, dtype=torch.float64)
    blocks, single = tokens(*BLOCKS), tokens(1, BLOCKS[1])  # with data parallelism, one rank has no samples at all
    found = {
        "activation": score_criteria(narrow, blocks, groups, criteria=PAIRS, **options),
        "activation, one block": score_criteria(narrow, single, groups, criteria=[("l2", "max")], **options),
    }
    # Layer by layer, ranks share the samples alone; of one block one of two ranks has none.
    whole = bool(streamed_faults(shape, groups.layout))
    for name, data in (("activation, streamed", blocks), ("activation, streamed, one block", single)):
        found[name] = (
            score_criteria(narrow, data, groups, criteria=PAIRS, **options)
            if whole
            else score_streamed(
                StreamedModel(random_checkpoint(shape), groups), data, criteria=PAIRS, micro_batch_size=2
            )
        )
    for name, data in (("taylor", blocks), ("taylor, one block", single)):
        criteria = [("sum", "l2"), ("sum", "max")]
        found[name] = score_criteria(wide, data, groups, criteria=criteria, estimator="taylor", **options)
    found["taylor kl"] = score_criteria(
        wide, blocks, groups, criteria=criteria, estimator="taylor", loss="kl", **options
    )
    for name, data in (("reconstruction", blocks), ("reconstruction, one block", single)):
        found[name] = score_criteria(
            wide, data, groups, criteria=[("none", "none")], estimator="reconstruction", **options
        )
    if groups.layout.tensor < 3 and groups.layout.pipeline < 3 and not groups.layout.virtual_pipeline:
        options["shape"] = MIXTURE
        for estimator, criteria in (
            ("activation", [("mean", "l2"), ("mean", "variance")]),
            ("taylor", [("sum", "l2"), ("sum", "variance")]),
            ("reconstruction", [("none", "none")]),
        ):
            found[f"mixture, {estimator}"] = score_criteria(
                live_mixture(groups), blocks, groups, criteria=criteria, estimator=estimator, **options
            )
    return found


def layout_case(layouts: dict[str, dict[str, Any]], shape: Any) -> dict[str, Any]:
    from nemo_minitron.runtime.groups import ParallelLayout, initialize

    return {name: score_all(shape, initialize(ParallelLayout(**layout))) for name, layout in layouts.items()}


@pytest.mark.slow
@pytest.mark.parametrize("world", sorted(LAYOUTS))
def test_scores_do_not_depend_on_the_layout(tmp_path: Path, world: int) -> None:
    from nemo_minitron.importance import Scores
    from nemo_minitron.pruning import choose_units

    shape = SHAPES[world]
    target = shape.replace(num_layers=3, hidden_size=14, ffn_hidden_size=22, num_query_groups=2, num_attention_heads=2)
    with one_process() as groups:
        expected = score_all(shape, groups)
    for rank, by_layout in enumerate(
        run_distributed(layout_case, world, tmp_path, layouts=LAYOUTS[world], shape=shape)
    ):
        assert by_layout.keys() == LAYOUTS[world].keys()
        for layout, by_estimator in by_layout.items():
            for estimator, scored in by_estimator.items():
                exact = not estimator.startswith("activation")  # in float64
                for scores, like in zip(scored, expected[estimator], strict=True):
                    for name in (*NAMES, *(["experts"] if like.experts is not None else [])):
                        torch.testing.assert_close(
                            getattr(scores, name),
                            getattr(like, name),
                            rtol=1e-9 if exact else 1e-5,
                            atol=1e-12 if exact else 1e-7,
                            msg=lambda m, at=f"rank {rank} {layout} {estimator} {name}": f"{at}: {m}",
                        )
                    if like.experts is not None:
                        continue
                    assert choose_units(scores, shape, target) == choose_units(like, shape, target)
                    if rank == 0:
                        # A file written under this layout prunes as one of a single process does.
                        scores.save(tmp_path / "scores", overwrite=True)
                        read = Scores.load(tmp_path / "scores")
                        assert choose_units(read, shape, target) == choose_units(like, shape, target)


def non_finite_case(estimator: str) -> str:
    from nemo_minitron.errors import NonFiniteError
    from nemo_minitron.importance import score_model
    from nemo_minitron.runtime.groups import ParallelLayout, initialize

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        # One row: under tensor parallelism one rank alone sees it first.
        tensors["decoder.layers.5.mlp.linear_fc1.weight"][0] = float("nan")

    groups = initialize(ParallelLayout(tensor=2, pipeline=2))
    chunks = live(random_checkpoint(WIDE, change=spoil), groups)
    try:
        score_model(chunks, tokens(*BLOCKS), groups, shape=WIDE, estimator=estimator)
    except NonFiniteError as error:
        return str(error)
    return "no error"


@pytest.mark.slow
def test_every_rank_raises_the_same_error(tmp_path: Path) -> None:
    messages = run_distributed(non_finite_case, 4, tmp_path, estimator="activation")
    assert len(set(messages)) == 1
    assert "decoder.layers.5: an activation of mlp.linear_fc2" in messages[0]
