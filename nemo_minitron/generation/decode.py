"""Answers of a live Megatron model, many prompts at once, under tensor, pipeline and data parallelism."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nemo_minitron.config import Sampling
from nemo_minitron.errors import ConfigError, DataError, NonFiniteError
from nemo_minitron.generation.sampling import check_sampling, choose, draws
from nemo_minitron.runtime.forward import evaluating
from nemo_minitron.runtime.groups import Groups

if TYPE_CHECKING:
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.models.gpt import GPTModel

__all__ = ["Answer", "generate_tokens"]


@dataclass(frozen=True)
class Answer:
    """The answer of a model to one prompt.

    Attributes:
        tokens: ids without the prompt; an end token is the last of them.
        logprobs: log-probability of each under the model itself, before temperature and truncation.
        finish: "stop" after an end token or where ``stop`` said so, "length" where the answer or the context was full.
    """

    tokens: list[int]
    logprobs: list[float]
    finish: str


@torch.no_grad()
def generate_tokens(
    chunks: list[GPTModel],
    groups: Groups,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    seed: int = 1234,
    ends: Iterable[int],
    vocab_size: int,
    max_length: int | None = None,
    requests: Sequence[int] | None = None,
    batch_size: int = 8,
    stop: Callable[[list[int]], bool] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Answer prompts of any lengths. Collective; every rank gets all answers.

    Keys and values are cached (``megatron.core.inference.contexts.StaticInferenceContext``), for each rank's own heads
    and layers. The prompts are sorted by length. The first forward pass of a batch has the length of its shortest
    prompt; after it, each pass has one token per row, and longer prompts are fed their own tokens until they end. So no
    row is padded, and attention needs only the causal mask. When half of the rows are done, they leave the batch. An
    answer is the same in any batch and layout up to rounding of the logits (see
    :func:`~nemo_minitron.generation.sampling.choose`).

    Under sequence or virtual pipeline parallelism, whose schedules cannot use a cache, each new token takes a forward
    pass over the whole text.

    Memory beyond the model: the cache, ``2 * layers/pp * batch * (longest prompt + max_new_tokens) * groups/tp *
    head_dim`` elements, and on the last stage three float64 tensors ``[batch, V]``.

    Args:
        chunks: this rank's part of the model, as ``runtime.model.build_model`` gives it, with weights loaded.
            Dropout is off during the call.
        groups: of this process; the prompts are divided among data-parallel ranks.
        prompts: token ids of each, the same on every rank.
        sampling: how tokens are chosen.
        seed: of the random draws.
        ends: ids that end an answer.
        vocab_size: true vocabulary; logits beyond it are padding.
        max_length: longest text, prompt and answer together; None for no limit.
        requests: number of each prompt's request; it and the seed determine the draws. None takes 0, 1, 2 ...
        batch_size: prompts of one forward pass on one data-parallel replica.
        stop: called on every rank after each token, with the answer's tokens so far; True ends the answer.
        progress: called with the number of prompts answered since its last call.

    Raises:
        ConfigError: for sampling settings that leave nothing to draw from, or expert parallelism.
        DataError: for prompts without a token, with an id beyond the vocabulary, or that fill ``max_length`` already.
        NonFiniteError: where a logit is NaN.
    """
    requests = range(len(prompts)) if requests is None else requests
    check_sampling(sampling, seed)
    _check(prompts, vocab_size, max_length)
    if groups.layout.expert > 1:
        # replicas answer different prompts, and come to an end after different numbers of passes
        raise ConfigError(f"parallel.expert={groups.layout.expert}: generation shares no experts out; set it to 1")
    texts = [
        _Text(number, list(ids), sampling, seed, request, max_length)
        for number, (ids, request) in enumerate(zip(prompts, requests, strict=True))
    ]
    # Neighbours in length share a batch, and every replica gets its share of the long ones.
    assigned = sorted(texts, key=lambda text: (len(text.ids), text.number))[groups.dp_rank :: groups.layout.data]
    decoder = _Decoder(chunks, groups, sampling, frozenset(ends), vocab_size, stop)
    with evaluating(chunks):
        for start in range(0, len(assigned), batch_size):
            batch = assigned[start : start + batch_size]
            decoder.answer(batch)
            if progress is not None:
                progress(min(len(batch) * groups.layout.data, len(prompts) - start * groups.layout.data))
    return _gathered(texts, assigned, groups, sampling.max_new_tokens, next(chunks[0].parameters()).device)


def _check(prompts: Sequence[Sequence[int]], vocab_size: int, max_length: int | None) -> None:
    faults = []
    for number, ids in enumerate(prompts):
        if not len(ids):
            faults.append(f"prompt {number}: has no token; write a longer one")
        elif not 0 <= min(ids) <= max(ids) < vocab_size:
            wrong = next(token for token in ids if not 0 <= token < vocab_size)
            faults.append(
                f"prompt {number}: token id {wrong} is not in the model's vocabulary of {vocab_size}; use the "
                "tokenizer that belongs to the model"
            )
        elif max_length is not None and len(ids) >= max_length:
            faults.append(
                f"prompt {number}: {len(ids)} tokens leave no room for an answer in a context of {max_length}; "
                "shorten it"
            )
    if faults:
        raise DataError("\n".join(faults))


@dataclass
class _Text:
    """A prompt and its answer so far."""

    number: int
    prompt: list[int]
    sampling: Sampling
    seed: int
    request: int
    max_length: int | None
    answer: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str = ""

    def __post_init__(self) -> None:
        self.ids = list(self.prompt)
        self.limit = self.sampling.max_new_tokens
        if self.max_length is not None:
            self.limit = min(self.limit, self.max_length - len(self.prompt))
        count = self.sampling.max_new_tokens
        self.drawn = [0.0] * self.limit
        if not self.sampling.greedy:
            self.drawn = draws(count, seed=self.seed, request=self.request).tolist()

    def extend(self, token: int, logprob: float) -> None:
        self.ids.append(token)
        self.answer.append(token)
        self.logprobs.append(logprob)


@dataclass
class _Decoder:
    """Runs batches of texts; the same on each rank of a replica."""

    chunks: list[GPTModel]
    groups: Groups
    sampling: Sampling
    ends: frozenset[int]
    vocab_size: int
    stop: Callable[[list[int]], bool] | None

    def __post_init__(self) -> None:
        self.device = next(self.chunks[0].parameters()).device
        # The last stage's first tensor-parallel rank speaks for all: they stay together whatever their rounding.
        ranks = dist.get_process_group_ranks(self.groups.model)
        self.source = ranks[self.groups.layout.tensor * (self.groups.layout.pipeline - 1)]

    def answer(self, texts: list[_Text]) -> None:
        """Fill in the answers."""
        if self.groups.layout.sequence_parallel or self.groups.layout.virtual_pipeline:
            self._without_cache(texts)
        else:
            self._with_cache(texts)

    def _without_cache(self, texts: list[_Text]) -> None:
        layout = self.groups.layout
        step = layout.tensor if layout.sequence_parallel else 1
        while live := [text for text in texts if not text.finish]:
            width = max(len(text.ids) for text in live)
            width += -width % step
            # What stands to the right of a causal text is not seen by it.
            tokens = torch.tensor([text.ids + [0] * (width - len(text.ids)) for text in live])
            last = torch.tensor([len(text.ids) - 1 for text in live], device=self.device)
            self._extend(live, *self._next(tokens, live, None, last))

    def _with_cache(self, texts: list[_Text]) -> None:
        from megatron.core.inference.contexts import StaticInferenceContext

        rows = list(texts)
        context = StaticInferenceContext(len(rows), max(len(text.prompt) + text.limit for text in rows))
        context.materialize_only_last_token_logits = True
        held = min(len(text.prompt) for text in rows)  # tokens of each row that the cache holds after the next pass
        tokens = torch.tensor([text.ids[:held] for text in rows])
        while True:
            ids, logprobs = self._next(tokens, rows, context, None)
            # A row whose text goes on already is fed that; one that is done runs along until the batch is cut.
            open_ = [index for index, text in enumerate(rows) if len(text.ids) == held and not text.finish]
            self._extend([rows[index] for index in open_], ids[open_], logprobs[open_])
            live = [index for index, text in enumerate(rows) if not text.finish]
            if not live:
                return
            if 2 * len(live) <= len(rows):
                rows = [rows[index] for index in live]
                _keep_rows(context, torch.tensor(live, device=self.device))
            context.sequence_len_offset += tokens.shape[1]  # Megatron before 0.13 has no method for it
            context.enable_decode_mode()
            tokens = torch.tensor([[text.ids[held] if held < len(text.ids) else 0] for text in rows])
            held += 1

    def _extend(self, texts: list[_Text], tokens: torch.Tensor, logprobs: torch.Tensor) -> None:
        for text, token, logprob in zip(texts, tokens.tolist(), logprobs.tolist(), strict=True):
            text.extend(int(token), logprob)
            if token in self.ends or (self.stop is not None and self.stop(text.answer)):
                text.finish = "stop"
            elif len(text.answer) == text.limit:
                text.finish = "length"

    def _next(
        self,
        tokens: torch.Tensor,
        texts: list[_Text],
        context: StaticInferenceContext | None,
        last: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The token after each row, and its log-probability, on every rank.

        Args:
            tokens: ``[b, s]``, which follow the tokens in ``context``.
            texts: the ``b`` texts of the batch.
            context: the cache.
            last: ``[b]`` position of each row's last token; None: the model gives the logits of the last alone.
        """
        logits = self._logits(tokens.to(self.device), context, last)
        chosen = torch.zeros(2, len(texts), dtype=torch.float64, device=self.device)
        if self.groups.is_last_stage:
            drawn = [text.drawn[len(text.answer)] if not text.finish else 0.0 for text in texts]
            token, logprob = choose(logits, self.sampling, torch.tensor(drawn, dtype=torch.float64, device=self.device))
            chosen = torch.stack([token.double(), logprob])
        dist.broadcast(chosen, src=self.source, group=self.groups.model)
        if not torch.isfinite(chosen[1]).all():
            raise NonFiniteError("generation: the model gave logits that are NaN or infinite; its weights are damaged")
        return chosen[0].long().cpu(), chosen[1].cpu()

    def _logits(
        self, tokens: torch.Tensor, context: StaticInferenceContext | None, last: torch.Tensor | None
    ) -> torch.Tensor:
        """``[b, V]`` float32 logits after each row, gathered over the tensor group; empty except on the last stage."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        layout = self.groups.layout
        start = 0 if context is None else context.sequence_len_offset
        positions = torch.arange(start, start + tokens.shape[1], device=self.device).expand_as(tokens)

        def forward_step(_: Any, model: GPTModel) -> tuple[torch.Tensor, Any]:
            return model(tokens, positions, None, inference_context=context), collect

        def collect(output: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
            rows = torch.arange(len(tokens), device=self.device)
            local = output[rows, -1 if last is None else last].float().contiguous()  # [b, V/tp]
            everyone = [torch.empty_like(local) for _ in range(layout.tensor)]
            dist.all_gather(everyone, local, group=self.groups.tp)
            return torch.cat(everyone, dim=-1)[:, : self.vocab_size]

        # The interleaved schedule runs no fewer micro-batches than there are stages: all are the same.
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[None] * len(self.chunks) if len(self.chunks) > 1 else None,
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=layout.pipeline if layout.virtual_pipeline else 1,
            seq_length=tokens.shape[1],
            micro_batch_size=len(tokens),
            forward_only=True,
            collect_non_loss_data=True,
        )
        return outputs[0] if self.groups.is_last_stage else torch.empty(0)


def _keep_rows(context: StaticInferenceContext, rows: torch.Tensor) -> None:
    """Cut the cache, ``[s, b, groups/tp, head_dim]`` a layer, down to some rows of its batch."""
    for layer, memory in context.key_value_memory_dict.items():
        context.key_value_memory_dict[layer] = tuple(part.index_select(1, rows) for part in memory)
    context.max_batch_size = len(rows)


_FINISH = ("stop", "length")


def _gathered(
    texts: list[_Text], answered: list[_Text], groups: Groups, longest: int, device: torch.device
) -> list[Answer]:
    """All answers on every rank: each fills its replica's rows of a table, which is summed over data-parallel ranks."""
    # Ids are exact in float64. Columns: length, finish, then the ids, then their log-probabilities.
    table = torch.zeros(len(texts), 2 + 2 * longest, dtype=torch.float64, device=device)
    for text in answered:
        count = len(text.answer)
        row = [float(count), float(_FINISH.index(text.finish)), *map(float, text.answer)]
        table[text.number, : 2 + count] = torch.tensor(row, dtype=torch.float64)
        table[text.number, 2 + longest : 2 + longest + count] = torch.tensor(text.logprobs, dtype=torch.float64)
    dist.all_reduce(table, group=groups.dp)
    answers = []
    for row in table.tolist():
        count = int(row[0])
        tokens = [int(token) for token in row[2 : 2 + count]]
        answers.append(Answer(tokens, row[2 + longest : 2 + longest + count], _FINISH[int(row[1])]))
    return answers
