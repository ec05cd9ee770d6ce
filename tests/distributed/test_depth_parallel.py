"""Layers left out under every layout against one process; a run that is killed goes on under another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.distributed import run_distributed
from support.pruning import SHAPE, live, one_process, random_checkpoint, tokens
from support.text import sentences, write_tokenizer

SHAPE_8 = SHAPE.replace(num_layers=8, vocab_size=123)
BLOCKS = (7, 13)  # odd, so that the last micro-batch of a data-parallel rank is filled up

#: By the number of processes: layouts share a launch.
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "tp2": {"tensor": 2},
        "tp2-sp": {"tensor": 2, "sequence_parallel": True},
        "pp2": {"pipeline": 2},
        "pp2-vp2": {"pipeline": 2, "virtual_pipeline": 2},
        "dp2": {"data": 2},
    },
    4: {
        "tp2-pp2-sp": {"tensor": 2, "pipeline": 2, "sequence_parallel": True},
        "pp2-dp2-vp2": {"pipeline": 2, "data": 2, "virtual_pipeline": 2},
    },
}


def encoded_task(tokenizer: Path) -> Any:
    from nemo_minitron.data.tasks import Question, encode_task

    texts = sentences(60, 6, seed=2)
    questions = [Question(texts[i] + " ", tuple(texts[i + 1 : i + 4]), i % 3) for i in range(0, 16, 4)]
    return encode_task(questions, tokenizer, vocab_size=SHAPE_8.vocab_size, max_length=64)


def measure(groups: Any, tokenizer: Path, **options: Any) -> Any:
    """Depth scores, by a task too; and the same bits without reuse."""
    from nemo_minitron.importance import layer_importance

    return layer_importance(
        live(random_checkpoint(SHAPE_8), groups),
        tokens(*BLOCKS, vocab=SHAPE_8.vocab_size),
        groups,
        shape=SHAPE_8,
        micro_batch_size=3,
        task=encoded_task(tokenizer),
        **{"block_lengths": [3], **options},
    )


def measure_streamed(groups: Any, tokenizer: Path) -> Any:
    """The same as :func:`measure` with greedy rounds, layer by layer, with states in files."""
    from nemo_minitron.importance import layer_importance_streamed
    from nemo_minitron.streamed import StreamedModel, Trail

    return layer_importance_streamed(
        StreamedModel(random_checkpoint(SHAPE_8), groups),
        tokens(*BLOCKS, vocab=SHAPE_8.vocab_size),
        micro_batch_size=3,
        task=encoded_task(tokenizer),
        block_lengths=[3],
        greedy=2,
        budget=20_000,
        trail=lambda candidates: Trail(tokenizer / "pass", {"candidates": candidates}, groups, every=0),
    )


def layout_case(layouts: dict[str, dict[str, Any]], tokenizer: Path) -> dict[str, Any]:
    from nemo_minitron.importance.depth_scores import depth_journal
    from nemo_minitron.runtime.groups import ParallelLayout, initialize

    found = {}
    for name, layout in layouts.items():
        groups = initialize(ParallelLayout(**layout))
        found[name] = measure(groups, tokenizer, greedy=2)
        plain = measure(groups, tokenizer, block_lengths=[], reuse_prefix=False)
        assert all(found[name].measured[layers] == one for layers, one in plain.measured.items()), name  # bit by bit
        if name == "dp2":
            found["dp2, streamed"] = measure_streamed(groups, tokenizer)
        # A journal that one process began goes on here.
        journal = depth_journal(tokenizer / f"journal-{name}", {})
        resumed = measure(groups, tokenizer, journal=journal)
        begun = journal.resumed if groups.is_main else 0
        found[f"{name}, resumed"] = (begun, resumed)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", sorted(LAYOUTS))
def test_depth_scores_do_not_depend_on_the_layout(tmp_path: Path, world: int) -> None:
    from nemo_minitron.importance.depth_scores import depth_journal
    from nemo_minitron.pruning.depth import choose_layers

    write_tokenizer(tmp_path)
    with one_process() as groups:
        expected = measure(groups, tmp_path, greedy=2)
    begun = list(expected.measured.items())[:5]
    for name in LAYOUTS[world]:
        journal = depth_journal(tmp_path / f"journal-{name}", {})
        journal.read()
        for layers, one in begun:
            journal.append([(layers, one)])
    for rank, found in enumerate(
        run_distributed(layout_case, world, tmp_path, layouts=LAYOUTS[world], tokenizer=tmp_path)
    ):
        for name in LAYOUTS[world]:
            count, resumed = found[f"{name}, resumed"]
            assert count == (5 if rank == 0 else 0)
            assert all(resumed.measured[layers] == one for layers, one in begun), (rank, name)
            assert found[name].measured.keys() == expected.measured.keys()
            for scores in (found[name], resumed):
                for layers, one in scores.measured.items():
                    assert one.loss == pytest.approx(expected.measured[layers].loss, rel=1e-5), (rank, name, layers)
                    assert one.accuracy == expected.measured[layers].accuracy, (rank, name, layers)
                for criterion in ("loss", "task"):
                    for form, number in (("lowest", 5), ("contiguous", 3)):
                        like = choose_layers(expected.costs(criterion), 8, number, form)
                        assert choose_layers(scores.costs(criterion), 8, number, form) == like, (name, criterion, form)
            if name == "dp2":
                streamed = found["dp2, streamed"]
                assert streamed.measured.keys() == expected.measured.keys()
                for layers, one in streamed.measured.items():
                    assert one.loss == pytest.approx(expected.measured[layers].loss, rel=1e-5), (rank, layers)
                    assert one.accuracy == expected.measured[layers].accuracy, (rank, layers)
            greedy = [choose_layers(scores.costs("loss"), 8, 2, "greedy") for scores in (found[name], expected)]
            assert greedy[0] == greedy[1]
