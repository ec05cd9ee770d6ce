"""``minitron steerlm2``: train a model that follows attributes further, with the attribute model's predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.config import Steerlm2Config
from nemo_minitron.data.chat.conversations import CHAT_PACKAGES, Chat
from nemo_minitron.errors import DataError
from nemo_minitron.jobs.plans import PlannedPath, StagePlan
from nemo_minitron.stages.shared.chats import align_plan, each_record, load_chats, shorter
from nemo_minitron.stages.shared.vocabulary import plan_vocabularies

if TYPE_CHECKING:
    import torch

    from nemo_minitron.alignment.steerlm2 import Responses
    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.checkpoints.tokenizer.comparison import CommonVocabulary
    from nemo_minitron.runtime.groups import Groups

__all__ = ["plan", "run"]


def plan(config: Steerlm2Config) -> StagePlan:
    """What :func:`run` would read, write and cost."""
    plan = align_plan(config, CHAT_PACKAGES)
    plan.reads += [PlannedPath(config.attribute_model, "attribute model"), PlannedPath(config.base, "base model")]
    plan_vocabularies(plan, ("model", config.model), ("base model", config.base))
    return plan


def run(config: Steerlm2Config) -> dict[str, Any]:
    """Train. Every rank runs this; rank 0 writes the model.

    Returns:
        ``steps``, ``prompts``, ``held_out``, the first and last validation ``distance`` and ``loss``, ``formats``.

    Raises:
        MinitronError: for data or models that do not fit each other, or a loss that is not finite.
    """
    import torch

    from nemo_minitron.accounting import warn_once
    from nemo_minitron.alignment.export import save_trained
    from nemo_minitron.alignment.steerlm2 import train_steerlm2
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.checkpoints.tokenizer.comparison import Vocabulary, compare
    from nemo_minitron.data.chat.templates import choose_template
    from nemo_minitron.data.tokenizer import load_tokenizer
    from nemo_minitron.runtime.files import read_json_lines

    source = open_checkpoint(config.model)
    common = compare(Vocabulary.of("model", source), Vocabulary.of("base model", open_checkpoint(config.base)))
    if common.warning is not None:
        warn_once(config.base, common.warning)
    tokenizer = load_tokenizer(source.tokenizer)
    template = choose_template(tokenizer, config.data.template)
    sampler = _Sampler(config, source, tokenizer, template, common)
    train, held_out = (sampler.prompts(chats) for chats in load_chats(config.data))
    output = Path(config.output)
    last = train_steerlm2(
        source,
        len(train),
        len(held_out),
        lambda chunks, groups: sampler.answer(chunks, groups, train, held_out),
        layout=config.parallel,
        schedule=config,
        seed=config.runtime.seed,
        directory=output,
        max_length=config.data.max_length,
        resume=config.resume,
    )
    if torch.distributed.get_rank() != 0:
        return {}
    lines = read_json_lines(output / "metrics.jsonl")
    validations = [line for line in lines if line.get("split") == "validation"]
    done = {"steps": max(line["step"] for line in lines), "prompts": len(train), "held_out": len(held_out)}
    return {
        **done,
        **{
            f"{when}_validation_{name}": line[name]
            for when, line in (("first", validations[0]), ("last", validations[-1]))
            for name in ("distance", "loss")
        },
        "formats": save_trained(
            source,
            last,
            output,
            template=template,
            lineage={"steerlm2": {"model": config.model, "base": config.base, **done}},
            formats=config.formats,
            check=config.verify,
        ),
    }


class _Sampler:
    """Answers of the model to be trained, with the scores of the attribute model and the base model."""

    def __init__(
        self, config: Steerlm2Config, source: Checkpoint, tokenizer: Any, template: Any, common: CommonVocabulary
    ) -> None:
        self.config, self.source, self.tokenizer, self.template = config, source, tokenizer, template
        self.common = common

    def prompts(self, chats: Sequence[Chat]) -> list[tuple[Chat, list[int]]]:
        """Conversations whose prompt, with the wanted values, leaves space for an answer; and its tokens."""
        from nemo_minitron.data.chat.templates import prompt_ids

        def encode(chat: Chat) -> list[int]:
            if not chat.attributes:
                raise DataError("has no attributes")
            return prompt_ids(
                chat.prompt, self.tokenizer, self.template, chat.attributes, tools=chat.tools, where=chat.where
            )

        rows = each_record(chats, encode, data=self.config.data)
        lengths = [len(ids) + self.config.max_new_tokens for _, ids in rows]
        return shorter(rows, lengths, [chat.where for chat, _ in rows], self.config.data)

    def answer(
        self, chunks: list[Any], groups: Groups, *parts: list[tuple[Chat, list[int]]]
    ) -> tuple[list[Responses], list[Responses]]:
        """Groups of answers for each part, the same on every rank."""
        from nemo_minitron.alignment.attribute_model import AttributeScorer, load_attribute_model
        from nemo_minitron.alignment.steerlm2 import Responses
        from nemo_minitron.data.chat.templates import choose_template, end_ids, prompt_ids, render
        from nemo_minitron.data.tokenizer import load_tokenizer
        from nemo_minitron.generation import Sampling, generate_tokens

        config, count = self.config, self.config.samples_per_prompt
        asked = [pair for part in parts for pair in part]
        rows = [ids for _, ids in asked for _ in range(count)]
        # At temperature 1 and without truncation, so that the log-probabilities are those of what was sampled from.
        answers = generate_tokens(
            chunks,
            groups,
            rows,
            sampling=Sampling(max_new_tokens=config.max_new_tokens),
            seed=config.runtime.seed,
            ends=end_ids(self.tokenizer, self.template),
            vocab_size=self.source.shape.vocab_size,
            batch_size=config.generation_batch,
        )
        chats = [chat for chat, _ in asked for _ in range(count)]
        texts = [str(self.tokenizer.decode(answer.tokens, skip_special_tokens=True)) for answer in answers]

        model = load_attribute_model(config.attribute_model)
        scorer = AttributeScorer(model, groups)
        if missing := {name for chat in chats for name in chat.attributes} - set(model.schema.names):
            raise DataError(
                f"{config.attribute_model}: does not predict {', '.join(sorted(missing))}; the data want values of it"
            )
        reader = load_tokenizer(scorer.checkpoint.tokenizer)
        template = choose_template(reader, model.template)
        read = [render(chat.answered(text), reader, template).ids for chat, text in zip(chats, texts, strict=True)]
        scores = scorer.scores(read, micro_batch_size=config.generation_batch)
        fits = [
            _log_fit(dict(zip(model.schema.names, row, strict=True)), chat.attributes, config.deviation)
            for row, chat in zip(scores.tolist(), chats, strict=True)
        ]
        plain = [prompt_ids(chat.prompt, self.tokenizer, self.template, tools=chat.tools) for chat in chats]
        likelihoods = self._log_likelihoods(groups, plain, [answer.tokens for answer in answers])
        sampled = [
            Responses(
                ids,
                [answers[at].tokens for at in here],
                [sum(answers[at].logprobs) for at in here],
                [fits[at] + likelihoods[at] for at in here],
            )
            for number, (_, ids) in enumerate(asked)
            for here in [range(number * count, (number + 1) * count)]
        ]
        return sampled[: len(parts[0])], sampled[len(parts[0]) :]

    def _log_likelihoods(self, groups: Groups, prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
        """``log P(y|x)`` of the base model over its own vocabulary, without attribute values.

        Raises:
            DataError: for a token that the base model does not know.
        """
        import torch

        from nemo_minitron.checkpoints import load_into, open_checkpoint
        from nemo_minitron.runtime.forward import block_losses
        from nemo_minitron.runtime.model import build_model

        base, common = open_checkpoint(self.config.base), self.common
        strange = (ids for row in (*prompts, *answers) for ids in row if ids >= common.size or ids in common.unlike)
        if (token := next(strange, None)) is not None:
            described = common.unlike.get(token, f"it has {base.shape.vocab_size} rows")
            raise DataError(
                f"base={self.config.base}: does not know token {token} of prompts and answers ({described}); name a "
                "base model with the same added tokens, or a template without them"
            )
        # Lengths are those of the answers: no multiples of the tensor-parallel size.
        groups = groups.without_sequence_parallel()
        chunks = build_model(base.shape, base.architecture, groups)
        load_into(chunks, base, groups)
        width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        blocks: torch.Tensor = torch.zeros(len(prompts), width, dtype=torch.int64)
        counted = torch.zeros(len(prompts), width - 1, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            blocks[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
            counted[row, len(prompt) - 1 : len(prompt) + len(answer) - 1] = True
        means = block_losses(
            chunks,
            groups,
            blocks,
            self.config.generation_batch,
            vocab_size=base.shape.vocab_size,
            counted=counted,
        )
        return [-float(value) for value in means * counted.sum(dim=1)]


def _log_fit(predicted: dict[str, float], wanted: Any, deviation: float) -> float:
    """``log P(a|x,y)`` up to a constant: prediction errors are taken as Gaussian with this standard deviation."""
    if not all(math.isfinite(value) for value in predicted.values()):
        raise DataError("the attribute model predicts values that are not finite; train it again")
    return -sum((predicted[name] - value) ** 2 for name, value in wanted.items()) / (2 * deviation**2)
