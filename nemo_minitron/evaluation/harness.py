"""Tasks of lm-evaluation-harness on a live Megatron model, under any layout.

Every rank runs the harness over all requests in the same order. The model behind it is the parallel Megatron model, and
its answers are the same on every rank.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nemo_minitron.data.chat.templates import SECONDS
from nemo_minitron.errors import DataError, first_line
from nemo_minitron.evaluation.continuations import continuation_scores
from nemo_minitron.evaluation.packs import PACKS, build_task, roleplay
from nemo_minitron.generation import Sampling, generate_tokens
from nemo_minitron.runtime.limits import time_limit
from nemo_minitron.runtime.progress import progress_bar

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from megatron.core.models.gpt import GPTModel
    from transformers import PreTrainedTokenizerBase

    from nemo_minitron.evaluation.packs.roleplay import Conversation
    from nemo_minitron.runtime.groups import Groups

__all__ = ["MegatronLM", "run_tasks"]

DEFAULT_NEW_TOKENS = 256  # of tasks that name no limit, as in the harness's own models
BOOTSTRAPS = 1000  # resamples for standard errors that have no formula (perplexities)
_TAIL = 16  # tokens of an answer that are looked at for a stop text, besides those of the text itself


class MegatronLM(TemplateLM):
    """The harness's model interface over a live Megatron model. It tokenises, truncates and stops as ``HFLM`` does.

    ``rank`` is 0 and ``world_size`` 1 on every process, whatever the layout: the harness itself distributes nothing.

    Args:
        chunks: this rank's part of the model, with weights loaded.
        groups: of this process.
        tokenizer: of the model.
        vocab_size: true vocabulary.
        max_length: the model's context.
        end_tokens: ids that end an answer, beside the tokenizer's EOS.
        batch_size: texts of one forward pass.
        seed: of sampled answers.
    """

    def __init__(
        self,
        chunks: list[GPTModel],
        groups: Groups,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocab_size: int,
        max_length: int,
        end_tokens: Sequence[int] = (),
        batch_size: int = 8,
        seed: int = 1234,
    ) -> None:
        super().__init__()
        if tokenizer.eos_token_id is None:
            raise DataError(f"{tokenizer.name_or_path}: the tokenizer names no end-of-text token, which tasks need")
        self.chunks, self.groups, self.tokenizer = chunks, groups, tokenizer
        self.vocab_size, self.max_length, self.batch_size, self.seed = vocab_size, max_length, batch_size, seed
        self.ends = tuple(dict.fromkeys([tokenizer.eos_token_id, *end_tokens]))
        self._device = next(chunks[0].parameters()).device

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's EOS."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: BOS if the tokenizer has one, else EOS."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, a key of the harness's request caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, by the tokenizer's template.

        Raises:
            DataError: if the template fails, refuses the conversation, or does not come to an end.
        """
        try:
            with time_limit(SECONDS):
                return str(
                    self.tokenizer.apply_chat_template(
                        chat_history,
                        tokenize=False,
                        add_generation_prompt=add_generation_prompt,
                        continue_final_message=not add_generation_prompt,
                    )
                )
        except Exception as error:  # a tokenizer's own template raises what it pleases
            raise DataError(
                f"harness.chat_template=true: the tokenizer's template fails ({type(error).__name__}: "
                f"{first_line(error)}); repair it, or set it to false"
            ) from error

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; no second BOS is added to a text that begins with BOS."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._scores([(context, continuation) for _, context, continuation in requests])

    def _scores(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        with progress_bar("likelihoods", len(pairs), shown=self.groups.is_main) as advance:
            return continuation_scores(
                self.chunks,
                self.groups,
                pairs,
                vocab_size=self.vocab_size,
                max_length=self.max_length,
                batch_size=self.batch_size,
                progress=advance,
            )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the context length; each token is predicted exactly once."""
        pairs: list[tuple[list[int], list[int]]] = []
        counts = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            before = len(pairs)
            pairs += [make_disjoint_window(window) for window in windows]
            counts.append(len(pairs) - before)
        scores = iter(self._scores(pairs))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop text, greedy unless the task samples. Stop text and EOS are cut off."""
        kinds: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            kinds[json.dumps(request.args[1], sort_keys=True)].append(number)
        generated = [""] * len(requests)
        with progress_bar("answers", len(requests), shown=self.groups.is_main) as advance:
            for kind, numbers in kinds.items():
                texts = [requests[number].args[0] for number in numbers]
                answers = self._answers(texts, numbers, json.loads(kind), advance)
                for number, answer in zip(numbers, answers, strict=True):
                    generated[number] = answer
        return generated

    def _answers(self, texts: list[str], numbers: list[int], kind: dict[str, Any], progress: Any) -> list[str]:
        settings = normalize_gen_kwargs(kind, DEFAULT_NEW_TOKENS)
        until, new = [text for text in settings["until"] if text], settings["max_gen_toks"]
        if new >= self.max_length:
            raise DataError(f"a task asks for {new} new tokens of a model with a context of {self.max_length}")
        sampled = {name: settings[name] for name in ("temperature", "top_k", "top_p") if name in settings}
        greedy = not settings["do_sample"]
        sampling = Sampling(max_new_tokens=new, greedy=greedy, **({} if greedy else sampled))
        longest = max((len(self.tokenizer.encode(text, add_special_tokens=False)) for text in until), default=0)

        def stop(answer: list[int]) -> bool:
            tail = self.tokenizer.decode(answer[-(longest + _TAIL) :])
            return any(text in tail for text in until)

        answers = generate_tokens(
            self.chunks,
            self.groups,
            [self.tok_encode(text)[-(self.max_length - new) :] for text in texts],
            sampling=sampling,
            seed=self.seed,
            ends=self.ends,
            vocab_size=self.vocab_size,
            max_length=self.max_length,
            requests=numbers,
            batch_size=self.batch_size,
            stop=stop if until else None,
            progress=progress,
        )
        cut = []
        for answer in answers:
            tokens = answer.tokens[:-1] if answer.tokens[-1] in self.ends else answer.tokens
            text = self.tokenizer.decode(tokens)
            cut.append(text[: min([len(text), *(text.find(mark) for mark in until if mark in text)])])
        return cut


def run_tasks(
    model: MegatronLM,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat_template: bool = False,
    seed: int = 1234,
    cache_dir: str | Path = ".cache/minitron",
) -> dict[str, dict[str, Any]]:
    """Evaluate on tasks of the harness and of packages (:data:`PACKS`).

    Every rank calls it; rank 0 gets the results, other ranks an empty mapping.

    Args:
        model: wraps the live model.
        tasks: names of tasks or groups.
        include_path: directory with the user's own tasks, in the harness's YAML form. Python files that they name are
            run.
        num_fewshot: examples in the context; None takes each task's own number.
        limit: documents of each task; None takes all.
        chat_template: put the prompts through the tokenizer's chat template.
        seed: of the choice of examples.
        cache_dir: packages are kept there, for the tasks whose data they carry.

    Returns:
        By task ``{"metrics": {"acc": 0.31, "acc_stderr": 0.01, ...}, "samples": documents, "num_fewshot": ...,
        "version": ...}``. A metric of another filter than "none" is called ``metric,filter``. Conversations have no
        metrics, but ``answers``.

    Raises:
        DataError: for unknown tasks, and for data that cannot be obtained.
        MissingDependency: if the checks of a task need a library that is not installed.
    """
    from lm_eval import simple_evaluate

    os.environ["DISABLE_MULTIPROC"] = "1"  # the harness's switch: its bootstrap shall not fork a process with groups
    foreign = tuple(task for task in tasks if task not in PACKS)
    manager = _manager(include_path, foreign)
    if unknown := _unknown(manager, foreign):
        raise DataError(
            f"harness.tasks: {', '.join(unknown)}: lm-evaluation-harness has no such task; `lm_eval ls tasks` lists "
            f"its own, {', '.join(PACKS)} have their data from packages, and harness.include_path adds yours"
        )
    if chat_template and not model.tokenizer.chat_template:
        raise DataError("harness.chat_template=true: the tokenizer carries no chat template; set it to false")
    built = {task: build_task(task, cache_dir) for task in tasks if task in PACKS}
    said = {
        task: _converse(model, built[task][:limit], chat_template)
        for task in tasks
        if task in PACKS and PACKS[task].turns
    }
    single = [task for task in tasks if task not in said]
    if not single:
        return said if model.groups.is_main else {}
    try:
        results = simple_evaluate(
            model,
            tasks=[built.get(task, task) for task in single],
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
            bootstrap_iters=BOOTSTRAPS,
            apply_chat_template=chat_template,
            task_manager=manager,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except TemplateError as error:
        raise DataError(
            f"harness.tasks={', '.join(tasks)}: a template of a task fails ({type(error).__name__}: "
            f"{first_line(error)}); repair the task's file"
        ) from error
    except (OSError, ValueError) as error:  # what `datasets` raises for data that are not there
        raise DataError(f"harness.tasks={', '.join(tasks)}: {type(error).__name__}: {error}") from error
    if results is None or not model.groups.is_main:  # the harness computes metrics on the first process of a machine
        return {}
    return {
        **said,
        **{name: _result(results, name) for name in results["results"]},
    }


def _result(results: dict[str, Any], name: str) -> dict[str, Any]:
    metrics = {
        key.removesuffix(",none"): value for key, value in results["results"][name].items() if _is_metric(key, value)
    }
    return {
        "metrics": metrics,
        "samples": results["n-samples"][name]["effective"] if name in results["n-samples"] else None,
        "num_fewshot": results["n-shot"].get(name),
        "version": results["versions"].get(name),
    }


def _converse(model: MegatronLM, asked: Sequence[Conversation], chat_template: bool) -> dict[str, Any]:
    """Answers to conversations, on every rank."""
    new = min(roleplay.MAX_NEW_TOKENS, model.max_length // 4)

    def generate(prompts: list[str], until: list[str]) -> list[str]:
        kind = {"until": until, "max_gen_toks": new, "do_sample": False}
        return model.generate_until(
            [Instance("generate_until", {}, (text, kind), number) for number, text in enumerate(prompts)]
        )

    return roleplay.answer_turns(asked, generate, model.apply_chat_template if chat_template else None)


@lru_cache(maxsize=4)
def _manager(include_path: str | None, tasks: tuple[str, ...]) -> TaskManager:
    """The index of tasks; only the user's if that has all of them, since the harness's own reads thousands of files."""
    from lm_eval.tasks import TaskManager

    if include_path is not None or not tasks:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if not _unknown(own, tasks):
            return own
    return TaskManager(include_path=include_path)


def _unknown(manager: TaskManager, tasks: Sequence[str]) -> list[str]:
    return [task for task in tasks if not manager.match_tasks([task])]


def _is_metric(key: str, value: Any) -> bool:
    """Whether an entry is ``metric,filter`` with a number; a standard error without a formula is "N/A"."""
    return "," in key and isinstance(value, int | float)
