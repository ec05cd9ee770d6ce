"""``minitron reinforce``: train a model on its own answers, by their rewards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.config import ReinforceConfig
from nemo_minitron.data.chat.conversations import CHAT_PACKAGES, Chat
from nemo_minitron.errors import ConfigError, DataError
from nemo_minitron.jobs.plans import PlannedPath, StagePlan
from nemo_minitron.stages.shared.chats import align_plan, each_record, load_chats, shorter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nemo_minitron.alignment.attribute_model import AttributeScorer
    from nemo_minitron.alignment.reinforce import Prompt
    from nemo_minitron.data.chat.templates import Template
    from nemo_minitron.generation import Answer

__all__ = ["plan", "run"]

logger = logging.getLogger(__name__)


def plan(config: ReinforceConfig) -> StagePlan:
    """What :func:`run` would read, write and cost."""
    plan = align_plan(config, CHAT_PACKAGES, copies=2)
    if config.reward is not None:
        plan.reads.append(PlannedPath(config.reward, "attribute model"))
    if config.steps is not None:
        answers = config.steps * config.prompts_per_step * config.samples_per_prompt
        plan.costs["answers"] = f"{answers} in {config.steps} steps"
    return plan


def run(config: ReinforceConfig) -> dict[str, Any]:
    """Train. Every rank runs this; rank 0 writes the model.

    Returns:
        ``steps``, ``prompts``, ``held_out``; ``first`` and ``last`` validation: ``reward`` and ``ended`` of answers to
        held-out prompts; ``first_reward`` and ``last_reward`` (means over the first and the last five steps), ``kl`` of
        the last step, ``formats``.

    Raises:
        MinitronError: for prompts, models or a layout that do not fit each other, or a loss that is not finite.
    """
    import torch

    from nemo_minitron.alignment.export import save_trained
    from nemo_minitron.alignment.reinforce import Rollouts, train_reinforce
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.data.chat.templates import choose_template, end_ids
    from nemo_minitron.data.tokenizer import load_tokenizer
    from nemo_minitron.generation import Sampling
    from nemo_minitron.runtime.files import read_json_lines

    checkpoint = open_checkpoint(config.model)
    tokenizer = load_tokenizer(checkpoint.tokenizer)
    template = choose_template(tokenizer, config.data.template)
    parts = [_prompts(config, part, tokenizer, template) for part in load_chats(config.data)]
    (chats, prompts), (_, held_out) = parts
    for part, wanted, name in (
        (prompts, config.prompts_per_step, "prompts_per_step"),
        (held_out, config.validation_prompts, "validation_prompts"),
    ):
        if len(part) < wanted:
            raise DataError(f"{name}={wanted}: the data hold {len(part)} such prompts; lower it or give more")
    rewards = _Rewards(config, [*chats, *parts[1][0]], tokenizer)
    held_out = [prompt._replace(number=prompt.number + len(chats)) for prompt in held_out]
    output = Path(config.output)
    last = train_reinforce(
        checkpoint,
        prompts,
        held_out,
        rewards,
        Rollouts(
            sampling=Sampling(
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
            ),
            seed=config.runtime.seed,
            ends=end_ids(tokenizer, template),
            vocab_size=checkpoint.shape.vocab_size,
            prompts_per_step=config.prompts_per_step,
            samples_per_prompt=config.samples_per_prompt,
            validation_prompts=config.validation_prompts,
            kl_penalty=config.kl_penalty,
            batch_size=config.generation_batch,
        ),
        layout=config.parallel,
        schedule=config,
        seed=config.runtime.seed,
        directory=output,
        max_length=config.data.max_length,
        resume=config.resume,
        prepare=rewards.open,
    )
    if torch.distributed.get_rank() != 0:
        return {}
    lines = read_json_lines(output / "metrics.jsonl")
    steps = [line for line in lines if "split" not in line]
    validations = [line for line in lines if line.get("split") == "validation"]
    done = {"steps": steps[-1]["step"], "prompts": len(prompts), "held_out": len(held_out)}
    lineage = {"model": config.model, "reward": config.reward or config.rule, **done}
    return {
        **done,
        "first": {name: validations[0][name] for name in ("reward", "ended")},
        "last": {name: validations[-1][name] for name in ("reward", "ended")},
        "first_reward": _mean([line["reward"] for line in steps[:5]]),
        "last_reward": _mean([line["reward"] for line in steps[-5:]]),
        "kl": steps[-1]["kl"],
        "formats": save_trained(
            checkpoint,
            last,
            output,
            template=template,
            lineage={"reinforce": lineage},
            formats=config.formats,
            check=config.verify,
        ),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _prompts(
    config: ReinforceConfig, chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, template: Template
) -> tuple[list[Chat], list[Prompt]]:
    """The conversations whose prompts leave space for an answer, and these prompts."""
    from nemo_minitron.alignment.reinforce import Prompt
    from nemo_minitron.data.chat.templates import prompt_ids

    def encode(chat: Chat) -> list[int]:
        attributes = chat.attributes if config.data.labelled else None
        return prompt_ids(chat.prompt, tokenizer, template, attributes, tools=chat.tools, where=chat.where)

    rows = each_record(chats, encode, data=config.data)
    lengths = [len(ids) + config.max_new_tokens for _, ids in rows]
    kept = shorter(rows, lengths, [chat.where for chat, _ in rows], config.data)
    return [chat for chat, _ in kept], [Prompt(number, ids) for number, (_, ids) in enumerate(kept)]


class _Rewards:
    """The reward of answers: predicted attribute values, weighted, or a rule."""

    def __init__(self, config: ReinforceConfig, chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.chats, self.tokenizer = config, chats, tokenizer
        self.scorer: AttributeScorer | None = None

    def open(self, groups: Any) -> None:
        """Load the attribute model on the process groups.

        Raises:
            ConfigError: for weights of attributes that it does not predict.
        """
        if self.config.reward is None:
            return
        import torch

        from nemo_minitron.alignment.attribute_model import AttributeScorer, load_attribute_model
        from nemo_minitron.data.chat.templates import choose_template
        from nemo_minitron.data.tokenizer import load_tokenizer

        attribute_model = load_attribute_model(self.config.reward)
        names = attribute_model.schema.names
        if unknown := [name for name in self.config.weights if name not in names]:
            raise ConfigError(
                f"weights: {', '.join(unknown)} is not predicted by {self.config.reward} ({', '.join(names)})"
            )
        self.scorer = AttributeScorer(attribute_model, groups)
        self.reader = load_tokenizer(self.scorer.checkpoint.tokenizer)
        self.template = choose_template(self.reader, attribute_model.template)
        weights = self.config.weights or dict.fromkeys(names, 1 / len(names))
        self.weights = torch.tensor([weights.get(name, 0.0) for name in names])

    def __call__(self, numbers: list[int], answers: list[Answer]) -> list[float]:
        """Rewards of answers to the prompts of these numbers."""
        if self.scorer is None:
            return [RULES[str(self.config.rule)](answer, self._text(answer), self.config) for answer in answers]
        from nemo_minitron.data.chat.templates import render

        # As text, since the attribute model may have a tokenizer and a template of its own.
        rows = [
            render(self.chats[number].answered(self._text(answer)), self.reader, self.template).ids
            for number, answer in zip(numbers, answers, strict=True)
        ]
        scores = self.scorer.scores(rows, micro_batch_size=self.config.generation_batch)
        return [float(value) for value in scores @ self.weights]

    def _text(self, answer: Answer) -> str:
        return str(self.tokenizer.decode(answer.tokens, skip_special_tokens=True))


#: From an answer and its text: the rewards that need no model, between 0 and 1.
RULES: dict[str, Callable[[Answer, str, ReinforceConfig], float]] = {
    "short": lambda answer, text, config: 1 - min(1.0, len(text.split()) / config.max_new_tokens),
    "long": lambda answer, text, config: min(1.0, len(text.split()) / config.max_new_tokens),
    "ends": lambda answer, text, config: float(answer.finish == "stop"),
}
