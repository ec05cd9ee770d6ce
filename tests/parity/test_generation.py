"""Generation from a live Megatron model: transformers' tokens, the same answers in any batch and layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import tiny_checkpoint
from support.distributed import run_distributed
from support.families import family_model

VOCAB = 131
GREEDY = {"greedy": True, "max_new_tokens": 9}
SAMPLED = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "max_new_tokens": 9}
PLAIN = {"max_new_tokens": 9}
ENDS = [2, *range(100, 112)]  # many, so that some answers of a random model end early
LENGTHS = (7, 1, 4, 11, 4, 2, 30)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


def answers(
    paths: list[str], layouts: dict[str, dict[str, Any]], settings: dict[str, dict[str, Any]], sizes: tuple[int, ...]
) -> dict[str, dict[str, Any]]:
    """On each rank, by layout: answers by ``model setting@batch size``, as ``(tokens, logprobs, finish)``."""
    from nemo_minitron.checkpoints import load_into, open_checkpoint
    from nemo_minitron.generation import Sampling, generate_tokens
    from nemo_minitron.runtime.groups import ParallelLayout, initialize
    from nemo_minitron.runtime.model import build_model

    found: dict[str, dict[str, Any]] = {}
    for title, layout in layouts.items():
        groups = initialize(ParallelLayout(**layout))
        for path in paths:
            checkpoint = open_checkpoint(path)
            chunks = build_model(checkpoint.shape, checkpoint.architecture, groups)
            load_into(chunks, checkpoint, groups)
            for name, sampling in settings.items():
                for size in sizes:
                    done: list[int] = []
                    result = generate_tokens(
                        chunks, groups, prompts(), sampling=Sampling(**sampling), seed=5, ends=ENDS, vocab_size=VOCAB,
                        max_length=36, batch_size=size, progress=done.append,
                    )  # fmt: skip
                    assert sum(done) == len(LENGTHS) or groups.dp_rank
                    key = f"{Path(path).name} {name}@{size}"
                    found.setdefault(title, {})[key] = [(one.tokens, one.logprobs, one.finish) for one in result]
            assert chunks[0].training
    return found


def same(one: list[tuple[list[int], list[float], str]], other: list[tuple[list[int], list[float], str]]) -> None:
    assert [(tokens, finish) for tokens, _, finish in one] == [(tokens, finish) for tokens, _, finish in other]
    for (_, first, _), (_, second, _) in zip(one, other, strict=True):
        assert first == pytest.approx(second, abs=1e-5)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [
        tiny_checkpoint(folder / "llama", num_hidden_layers=4),
        family_model("nemotron", folder / "nemotron"),
    ]


@pytest.fixture(scope="module")
def alone(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process answers."""
    settings = {"greedy": GREEDY, "sampled": SAMPLED, "plain": PLAIN}
    paths, folder = [str(path) for path in models], tmp_path_factory.mktemp("alone")
    found = run_distributed(answers, 1, folder, paths=paths, layouts={"": {}}, settings=settings, sizes=(1, 3, 7))
    return found[0][""]


@pytest.mark.slow
def test_greedy_is_that_of_transformers_and_logprobs_those_of_a_full_pass(
    models: list[Path], alone: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    for path in models:
        model = AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.float32).eval()
        for name in ("greedy", "sampled", "plain"):
            for ids, (tokens, logprobs, finish) in zip(prompts(), alone[f"{path.name} {name}@3"], strict=True):
                limit = min(9, 36 - len(ids))
                with torch.no_grad():
                    logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].double()
                    expected = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None]).squeeze(-1)
                    assert logprobs == pytest.approx(expected.tolist(), abs=1e-5)
                    if name == "greedy":
                        theirs = model.generate(
                            torch.tensor([ids]), max_new_tokens=limit, do_sample=False, eos_token_id=ENDS,
                            pad_token_id=0, attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                        )  # fmt: skip
                        assert tokens == theirs[0, len(ids) :].tolist()
                assert finish == ("stop" if tokens[-1] in ENDS else "length")
                assert len(tokens) == limit or finish == "stop"
        finishes = {finish for _, _, finish in alone[f"{path.name} plain@3"]}
        assert finishes == {"stop", "length"}  # both ways are seen


@pytest.mark.slow
def test_an_answer_is_the_same_in_any_batch(alone: dict[str, Any]) -> None:
    for name, found in alone.items():
        same(found, alone[name.split("@")[0] + "@1"])


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2-pp2": {"tensor": 2, "pipeline": 2},
    "tp2-sp-dp2": {"tensor": 2, "sequence_parallel": True, "data": 2},
    "pp2-vp2-dp2": {"pipeline": 2, "virtual_pipeline": 2, "data": 2},
    "dp4": {"data": 4},
}


@pytest.mark.slow
def test_every_layout_answers_as_one_process(models: list[Path], alone: dict[str, Any], tmp_path: Path) -> None:
    settings = {"greedy": GREEDY, "sampled": SAMPLED}
    ranks = run_distributed(
        answers, 4, tmp_path, paths=[str(models[0])], layouts=LAYOUTS, settings=settings, sizes=(3,)
    )
    for layouts in ranks:
        assert list(layouts) == list(LAYOUTS)
        for found in layouts.values():
            for name, result in found.items():
                same(result, alone[name])
