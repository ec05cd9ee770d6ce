"""``sft`` and ``dpo`` with NeMo-Aligner: losses against plain torch, layouts, resumes, rounds, exported models.

Four launches: one process that does everything once, then TP 2, PP 2 and TP 2 x PP 2, of which the second and third
are killed and the last goes on where they were.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.chats import chat_checkpoint, chats, preferences, write_jsonl
from support.distributed import run_distributed
from support.signals import stopped_and_resumed

STEPS, SAVED_AT = 6, 3
pytestmark = pytest.mark.timeout(900)  # one launch in which a busy machine does all that the tests look at

COMMON: dict[str, Any] = {
    "micro_batch_size": 2, "global_batch_size": 4, "steps": STEPS, "lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 2,
    "validate_every": SAVED_AT, "save_every": SAVED_AT, "verify": False,
}  # fmt: skip
TEMPLATE = "chatml"
#: Losses of Aligner, with what else of its settings each is tried with.
LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"preference_average_log_probs": True},
    "ipo": {},
    "rpo_sq": {"reward_scale": 0.3},
    "rpo_bwd_kl": {"reward_scale": 0.7, "sft_loss_weight": 0.5},
    "rpo_fwd_kl": {"sft_loss_weight": 0.25, "sft_average_log_probs": True},
}
BETA = 0.2


def align(folder: str, out: str, tensor: int, pipeline: int, jobs: list[str], die: int | None = None) -> dict[str, Any]:
    """Run stages one after the other in one process; with ``die``, the last is killed in the middle of that step."""
    from nemo_minitron.alignment.metrics import MetricsLog
    from nemo_minitron.config import ChatDataConfig, DpoConfig, ParallelLayout, SftConfig
    from nemo_minitron.errors import NonFiniteError
    from nemo_minitron.stages import dpo, sft

    root = Path(folder)
    logged: Callable[..., None] = MetricsLog.log_metrics

    def kill(self: MetricsLog, metrics: dict[str, Any], step: int, prefix: str = "") -> None:
        if prefix == "train/" and step == die and "round-1" not in str(self.directory):
            os._exit(9)
        logged(self, metrics, step, prefix)

    common: dict[str, Any] = COMMON | {
        "model": str(root / "model"), "parallel": ParallelLayout(tensor=tensor, pipeline=pipeline),
    }  # fmt: skip
    found: dict[str, Any] = {}
    for job in jobs:
        if die is not None and job == jobs[-1]:
            MetricsLog.log_metrics = kill  # type: ignore[method-assign]
        name = "preferences" if job.startswith("dpo") else "chats"
        data = ChatDataConfig(
            path=str(root / f"{name}.jsonl"), validation=str(root / f"{name}-held-out.jsonl"), template=TEMPLATE,
            max_length=128,
        )  # fmt: skip
        common |= {"data": data, "output": f"{out}/{job}"}
        if job == "sft":
            found[job] = sft.run(SftConfig(**common, formats=["hf", "nemo"] if tensor * pipeline == 1 else []))
        elif job == "sft-stopped":
            found[job] = stopped_and_resumed(sft, SftConfig(**common), only=1)
        elif job == "sft-broken":
            broken = SftConfig(**common | {"lr": 1e20, "clip_grad": 0.0, "warmup_steps": 0})
            try:
                sft.run(broken)
            except NonFiniteError as error:
                found[job] = str(error)
        elif job == "sft-packed":
            found[job] = sft.run(
                SftConfig(**common | {"micro_batch_size": 1, "steps": 1, "warmup_steps": 0}, pack=True)
            )
        elif job == "dpo":
            found[job] = dpo.run(DpoConfig(**common | {"lr": 1e-3}, rounds=2, sft_loss_weight=0.1))
        else:  # the weights stay where they are, so that the loss of the held-out pairs is that of the initial policy
            still = {"steps": 1, "lr": 1e-12, "min_lr": 0.0, "warmup_steps": 0, "validate_every": 1, "save_every": 1}
            loss = job.removeprefix("dpo-")
            config = DpoConfig(
                **common | still, loss=loss, beta=BETA, reference=str(root / "reference"), **LOSSES[loss]
            )
            found[job] = dpo.run(config)
    return found


def against_aligner(folder: str) -> dict[str, Any]:
    """Our tokens and masks beside those of Aligner's own dataset classes; True where they agree."""
    from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_chat_dataset import GPTSFTChatDataset
    from nemo.collections.nlp.modules.common.tokenizer_utils import get_nmt_tokenizer
    from nemo_aligner.data.nlp.datasets import DPOModelDataset
    from omegaconf import OmegaConf

    from nemo_minitron.alignment.batches import Sample, collate
    from nemo_minitron.alignment.pairs import Pair, Pairs
    from nemo_minitron.data.chat.conversations import parse_chat
    from nemo_minitron.data.chat.preferences import parse_preference
    from nemo_minitron.data.chat.templates import choose_template, render
    from nemo_minitron.data.tokenizer import load_tokenizer

    root = Path(folder)
    ours, theirs = load_tokenizer(root / "model"), get_nmt_tokenizer("huggingface", str(root / "model"), use_fast=True)
    rows = chats(6)
    found: dict[str, Any] = {}
    forms = {
        "nemotron": ("<extra_id_0>", "<extra_id_1>", "\n", "\n", "<extra_id_2>"),
        "chatml": ("<|im_start|>", "<|im_start|>", "<|im_end|>\n", "\n", "<extra_id_2>"),
    }
    for case in ("nemotron", "nemotron with labels", "chatml"):
        name = case.partition(" ")[0]
        system, turn, end, name_end, label = forms[name]
        labels = {"user": "quality:3", "assistant": "quality:4,toxicity:0"} if case != name else {}
        special = {
            "system_turn_start": system, "turn_start": turn, "end_of_turn": end, "end_of_name": name_end,
            "label_start": label,
        }  # fmt: skip
        say = str.capitalize if name == "nemotron" else str
        lines = [
            {
                "system": next((m["content"] for m in row["messages"] if m["role"] == "system"), ""),
                "mask": say("user"),
                "type": "VALUE_TO_TEXT",
                "conversations": [
                    {"from": say(m["role"]), "value": m["content"], "label": labels.get(m["role"])}
                    for m in row["messages"] if m["role"] != "system"
                ],
            }
            for row in rows
        ]  # fmt: skip
        path = write_jsonl(root / f"aligner-{case}.jsonl", lines)
        dataset = GPTSFTChatDataset(
            str(path), theirs, 256, 1, 8, add_bos=False, add_eos=False, special_tokens=special,
            prompt_template="", hf_dataset=True,
        )  # fmt: skip
        template, same = choose_template(ours, name), []
        for line, item in zip(lines, (dataset[index] for index in range(len(rows))), strict=True):
            ids, answers = render(parse_chat(line), ours, template, labelled=bool(labels))
            if name == "nemotron":
                batch = collate(8, masked=False)([Sample(ids, answers, (len(ids),))])
                other = dataset.collate_fn([item])
                length = len(ids) - 1
                same.append(
                    all(
                        torch.equal(batch[key][0, :length].long(), other[key][0, :length].long())
                        for key in ("tokens", "labels", "loss_mask", "position_ids")
                    )
                )
            else:
                # Aligner writes ``System`` before any conversation and the start of a turn behind it.
                start = theirs.text_to_ids(f"{system}user")
                body = item["input_ids"].tolist()[:-1]
                at = next(index for index in range(len(body)) if body[index : index + len(start)] == start)
                mine = next(index for index in range(len(ids)) if ids[index : index + len(start)] == start)
                inside = item["mask"].tolist()[at:-1]
                ends = [ids[index] in theirs.text_to_ids(turn + end) for index in range(mine, len(ids))]
                masks = zip(answers[mine:], inside, ends, strict=True)
                same.append(ids[mine:] == body[at:] and all(a == b or (b and e) for a, b, e in masks))
        found[case] = same
    template, same = choose_template(ours, "nemotron"), []
    for row in preferences(6):
        one = parse_preference(row)
        sides = [render(chat, ours, template, last_answer_only=True) for chat in one.chats()]
        texts = [ours.decode(side.ids, skip_special_tokens=False) for side in sides]
        prompt = texts[0][: texts[0].index("Assistant\n") + len("Assistant\n")]
        payload = {
            "prompt": prompt, "chosen_response": texts[0].removeprefix(prompt),
            "rejected_response": texts[1].removeprefix(prompt),
            **{key: value for key, value in row.items() if key.endswith("_reward")},
        }  # fmt: skip
        theirs_item = DPOModelDataset(
            OmegaConf.create({"data": {}}), theirs, "train", "", torch.arange(1).numpy(), [payload], 256, 1
        )[0]
        rewards = [1.0 if one.chosen_reward is None else one.chosen_reward, one.rejected_reward or 0.0]
        samples = [Sample(side.ids, side.answers, (len(side.ids),)) for side in sides]
        item = Pairs([Pair(samples[0], samples[1], rewards[0], rewards[1])])[0]
        used = {key: value.clone() for key, value in item.items() if isinstance(value, torch.Tensor)}
        for side in ("chosen", "rejected"):  # padding is no input of the loss
            used[side][item[f"{side}_length"] :] = theirs.eos_id
        same.append(
            item.keys() == theirs_item.keys()
            and all(torch.equal(used[key], theirs_item[key]) for key in used)
            and all(item[key] == theirs_item[key] for key in item.keys() - used.keys())
        )
    found["pairs"] = same
    return found


def everything(folder: str, out: str, jobs: list[str]) -> dict[str, Any]:
    return {"aligner": against_aligner(folder), "jobs": align(folder, out, 1, 1, jobs)}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models with one tokenizer, conversations and pairs."""
    folder = tmp_path_factory.mktemp("alignment")
    chat_checkpoint(folder / "model", seed=0)
    chat_checkpoint(folder / "reference", seed=1)
    for name, rows in (("chats", chats(32)), ("preferences", preferences(32))):
        write_jsonl(folder / f"{name}.jsonl", rows[:24])
        write_jsonl(folder / f"{name}-held-out.jsonl", rows[24:])
    return folder


@pytest.fixture(scope="module")
def whole(workspace: Path) -> dict[str, Any]:
    """What one process does."""
    jobs = ["sft", "sft-stopped", "sft-broken", "sft-packed", "dpo", *(f"dpo-{loss}" for loss in LOSSES)]
    (found,) = run_distributed(
        everything, 1, workspace, timeout=600, folder=str(workspace), out=str(workspace / "one"), jobs=jobs
    )
    return dict(found)


def lines(path: Path, split: str, name: str = "loss") -> dict[int, float]:
    """A metric by step."""
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[name] for row in rows if row.get("split", "train") == split}


def model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.float32).eval()


def samples(workspace: Path, name: str) -> list[Any]:
    """Held-out conversations as ``(ids, answers)``; of pairs, chosen and rejected in turn."""
    from nemo_minitron.data.chat.conversations import read_chats
    from nemo_minitron.data.chat.preferences import read_preferences
    from nemo_minitron.data.chat.templates import choose_template, render
    from nemo_minitron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(workspace / "model")
    template = choose_template(tokenizer, TEMPLATE)
    path = workspace / f"{name}-held-out.jsonl"
    if name == "chats":
        return [render(chat, tokenizer, template) for chat in read_chats(path)]
    both = [chat for pair in read_preferences(path) for chat in pair.chats()]
    return [render(chat, tokenizer, template, last_answer_only=True) for chat in both]


@torch.no_grad()
def answer_logprobs(found: Any, rendered: Any) -> torch.Tensor:
    """Log-probabilities of the trained tokens, by transformers."""
    ids = torch.tensor(rendered.ids)
    scores = F.log_softmax(found(ids[None]).logits[0, :-1], dim=-1)
    chosen = scores.gather(1, ids[1:, None])[:, 0]
    return chosen[torch.tensor(rendered.answers[1:])]


@pytest.mark.slow
def test_sft_loss_packed_and_not_is_cross_entropy_of_the_answers(workspace: Path, whole: dict[str, Any]) -> None:
    from nemo_minitron.alignment.batches import Sample, pack

    rows = samples(workspace, "chats")
    policy = model(workspace / "model")
    tokens = [-answer_logprobs(policy, row) for row in rows]
    pairs = [torch.cat(tokens[start : start + 2]).mean() for start in range(0, len(rows), 2)]
    found = lines(workspace / "one" / "sft", "validation")
    assert found[0] == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-5)
    # Of a row that holds several conversations, the mean over their tokens.
    losses = {tuple(row.ids): loss for row, loss in zip(rows, tokens, strict=True)}
    means = []
    for row in pack([Sample(row.ids, row.answers, (len(row.ids),)) for row in rows], 128):
        starts = [sum(row.lengths[:number]) for number in range(len(row.lengths))]
        parts = [tuple(row.ids[at : at + n]) for at, n in zip(starts, row.lengths, strict=True)]
        means.append(torch.cat([losses[part] for part in parts]).mean())
    assert len(means) < len(rows)
    found = lines(workspace / "one" / "sft-packed", "validation")
    assert found[0] == pytest.approx(torch.stack(means).mean().item(), abs=1e-5)
    assert whole["jobs"]["sft-packed"]["packed_rows"] < whole["jobs"]["sft-packed"]["samples"] == 24


@pytest.mark.slow
def test_the_aligned_model_in_every_format_is_the_trained_one(workspace: Path, whole: dict[str, Any]) -> None:
    """The exported models' own loss is the last validation's; the tokenizer says what training read."""
    from transformers import AutoTokenizer

    from nemo_minitron.checkpoints import open_checkpoint

    out = workspace / "one" / "sft"
    policy = model(out / "hf")
    rows = samples(workspace, "chats")
    tokens = [-answer_logprobs(policy, row) for row in rows]
    pairs = [torch.cat(tokens[start : start + 2]).mean() for start in range(0, len(rows), 2)]
    losses = lines(out, "validation")
    assert losses[STEPS] == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-4)
    assert losses[STEPS] < losses[0] - 0.5
    assert list(lines(out, "train")) == list(range(1, STEPS + 1))
    opened = {name: open_checkpoint(out / name) for name in ("model", "hf", "model.nemo")}
    for name in opened["hf"].weights.names():
        first, *others = (one.weights.tensor(name) for one in opened.values())
        assert all(torch.equal(first, other) for other in others), name
    tokenizer = AutoTokenizer.from_pretrained(out / "hf")
    held_out = [json.loads(line) for line in (workspace / "chats-held-out.jsonl").read_text().splitlines()]
    assert [tokenizer.apply_chat_template(row["messages"]) for row in held_out] == [row.ids for row in rows]
    assert policy.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert opened["hf"].lineage["sft"]["steps"] == STEPS
    assert set(whole["jobs"]["sft"]["formats"]) == {"nemo2", "hf", "nemo"}


@pytest.mark.slow
def test_a_signal_and_a_loss_that_is_not_finite_end_in_good_order(workspace: Path, whole: dict[str, Any]) -> None:
    assert whole["jobs"]["sft-stopped"].startswith(f"stopped by a signal after step 2 of {STEPS}: its state is saved")
    for split in ("train", "validation"):
        ours, expected = (lines(workspace / "one" / job, split) for job in ("sft-stopped", "sft"))
        assert ours == pytest.approx(expected, abs=1e-6)
    assert re.match(r"the training loss is (nan|inf); the weights are those of", whole["jobs"]["sft-broken"])
    assert not list((workspace / "one" / "sft-broken" / "checkpoints").glob("*"))


@pytest.mark.slow
def test_tokens_masks_and_pairs_are_those_of_aligners_datasets(whole: dict[str, Any]) -> None:
    assert whole["aligner"] == {name: [True] * 6 for name in ("nemotron", "nemotron with labels", "chatml", "pairs")}


def bernoulli_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """``KL(p || q)`` of two coins."""
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


@pytest.mark.slow
@pytest.mark.parametrize("loss", [*LOSSES])
def test_preference_losses_are_their_formulae(loss: str, workspace: Path, whole: dict[str, Any]) -> None:
    """In float64 from logits of transformers: DPO (arXiv 2305.18290), IPO (2310.12036), RPO (2406.11704)."""
    options = {"reward_scale": 1.0, "sft_loss_weight": 0.0, **LOSSES[loss]}
    rows = samples(workspace, "preferences")
    policy, reference = model(workspace / "model"), model(workspace / "reference")
    sums, likelihoods = [], []
    for row in rows:
        ours, theirs = (answer_logprobs(one, row).double() for one in (policy, reference))
        sums.append((ours - theirs).mean() if options.get("preference_average_log_probs") else (ours - theirs).sum())
        likelihoods.append(ours.mean() if options.get("sft_average_log_probs") else ours.sum())
    ratios = torch.stack(sums).reshape(-1, 2)
    gap = ratios[:, 0] - ratios[:, 1]
    held_out = [json.loads(line) for line in (workspace / "preferences-held-out.jsonl").read_text().splitlines()]
    given = torch.tensor([r.get("chosen_reward", 1.0) - r.get("rejected_reward", 0.0) for r in held_out]).double()
    given = options["reward_scale"] * given
    policy_says, data_say = torch.sigmoid(BETA * gap), torch.sigmoid(given)
    expected = {
        "dpo": lambda: -policy_says.log(),
        "ipo": lambda: (gap - 1 / (2 * BETA)) ** 2,
        "rpo_sq": lambda: (BETA * gap - given) ** 2,
        "rpo_bwd_kl": lambda: bernoulli_kl(data_say, policy_says),
        "rpo_fwd_kl": lambda: bernoulli_kl(policy_says, data_say),
    }[loss]().mean()
    sft = -torch.stack(likelihoods).reshape(-1, 2)[:, 0].mean()
    out = workspace / "one" / f"dpo-{loss}" / "round-1"
    assert lines(out, "validation", "preference_loss")[1] == pytest.approx(expected.item(), rel=2e-5, abs=1e-6)
    whole_loss = expected + options["sft_loss_weight"] * sft
    assert lines(out, "validation")[1] == pytest.approx(whole_loss.item(), rel=2e-5, abs=1e-6)
    (statistics,) = whole["jobs"][f"dpo-{loss}"]["rounds"]
    sums_only = [(answer_logprobs(policy, row) - answer_logprobs(reference, row)).double().sum() for row in rows]
    difference = torch.stack(sums_only).reshape(-1, 2) @ torch.tensor([1.0, -1.0], dtype=torch.double)
    assert statistics["before"]["pairs"] == len(held_out)
    assert statistics["before"]["margin"] == pytest.approx(BETA * difference.mean().item(), rel=1e-4)
    assert statistics["before"]["accuracy"] == pytest.approx((difference > 0).double().mean().item())
    assert statistics["after"]["margin"] == pytest.approx(statistics["before"]["margin"], abs=1e-4)


@pytest.mark.slow
def test_the_first_dpo_loss_is_ln_2_and_rounds_move_their_reference(workspace: Path, whole: dict[str, Any]) -> None:
    first, second = whole["jobs"]["dpo"]["rounds"]
    for number, one in enumerate((first, second), 1):
        out = workspace / "one" / "dpo" / f"round-{number}"
        assert lines(out, "train", "preference_loss")[1] == pytest.approx(math.log(2), abs=1e-6)
        assert lines(out, "train", "rewards_chosen_mean")[1] == pytest.approx(0.0, abs=1e-5)
        assert one["before"]["margin"] == 0
        assert one["before"]["accuracy"] == 0.5
        assert one["after"]["margin"] > 0.05
        assert one["after"]["accuracy"] > 0.5
    # The second round begins with the policy that the first left.
    for name in ("likelihood_margin", "likelihood_accuracy"):
        assert second["before"][name] == pytest.approx(first["after"][name], abs=1e-5)
    still = workspace / "one" / "dpo-dpo" / "round-1"
    assert lines(still, "train", "preference_loss")[1] != pytest.approx(math.log(2), abs=1e-3), "another reference"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_layout_and_resume_is_one_training(workspace: Path, whole: dict[str, Any]) -> None:
    """Kills and resumes included, and a resume under another layout: per-step losses to 1e-4."""
    fixed = {"folder": str(workspace), "timeout": 600}
    with pytest.raises(AssertionError, match=r"exit 9"):
        jobs = ["dpo", "sft"]
        run_distributed(
            align, 2, workspace, **fixed, out=str(workspace / "a"), tensor=2, pipeline=1, jobs=jobs, die=SAVED_AT + 1
        )
    with pytest.raises(AssertionError, match=r"exit 9"):
        jobs = ["sft", "dpo"]
        run_distributed(
            align, 2, workspace, **fixed, out=str(workspace / "b"), tensor=1, pipeline=2, jobs=jobs, die=SAVED_AT + 1
        )
    assert max(lines(workspace / "a" / "sft", "train")) == max(lines(workspace / "b" / "dpo" / "round-2", "train"))
    both = workspace / "c"
    both.mkdir()
    (workspace / "a" / "sft").rename(both / "sft")
    (workspace / "b" / "dpo").rename(both / "dpo")
    found = run_distributed(align, 4, workspace, **fixed, out=str(both), tensor=2, pipeline=2, jobs=["sft", "dpo"])
    expected = workspace / "one"
    for run in ("a/dpo/round-1", "a/dpo/round-2", "b/sft", "c/sft", "c/dpo/round-1", "c/dpo/round-2"):
        job = run.split("/", 1)[1]
        for split in ("train", "validation"):
            ours = lines(workspace / run, split)
            assert ours == pytest.approx(lines(expected / job, split), abs=1e-4), (run, split)
    for one, two in zip(found[0]["dpo"]["rounds"], whole["jobs"]["dpo"]["rounds"], strict=True):
        assert one["before"] == pytest.approx(two["before"], abs=1e-4)
        assert one["after"] == pytest.approx(two["after"], abs=1e-3)
