"""Texts and conversations to token ids, in this process or in several others, with the same result.

Worker processes are started with "spawn". With a fast tokenizer they import neither torch nor transformers: they need
only its JSON.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nemo_minitron.data.bad_records import BadRecord
from nemo_minitron.errors import DataError, MinitronError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nemo_minitron.data.chat.conversations import Chat

__all__ = ["Encoded", "Encoder", "Refused", "encode_all"]

BATCH_ITEMS = 256
BATCH_CHARACTERS = 1 << 20
SMALL_CHARACTERS = 8 << 20
"""Less text than this is not worth starting processes for."""
MOST_WORKERS = 16


class Encoded(NamedTuple):
    """One document.

    Attributes:
        ids: ``[n]`` int32, closed by EOS.
        answers: ``[n]`` bool, the tokens that are learned; None if all are.
    """

    ids: np.ndarray
    answers: np.ndarray | None


class Refused(NamedTuple):
    """A conversation that the template cannot write.

    Attributes:
        where: its file and place.
        reason: why not.
        record: the conversation.
    """

    where: str
    reason: str
    record: dict[str, Any]


@dataclass(frozen=True)
class Encoder:
    """Turns documents into tokens; it can be sent to another process.

    Attributes:
        backend: JSON of a fast tokenizer; None for a slow tokenizer, and for conversations, which need transformers.
        directory: directory of the tokenizer.
        end: id of EOS, which closes every document.
        template: name of the chat template of conversations; None for plain text.
    """

    backend: str | None
    directory: str
    end: int
    template: str | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *, template: str | None = None) -> Encoder:
        """The encoder of a loaded tokenizer.

        Raises:
            DataError: if it has no EOS, or cannot run the template.
        """
        end = tokenizer.eos_token_id
        if end is None:
            raise DataError(
                f"{tokenizer.name_or_path}: the tokenizer names no end-of-text token, which separates documents; "
                "set eos_token in its tokenizer_config.json"
            )
        if template is not None:
            from nemo_minitron.data.chat.templates import choose_template

            choose_template(tokenizer, template)
        fast = template is None and tokenizer.is_fast
        backend = tokenizer.backend_tokenizer.to_str() if fast else None  # type: ignore[attr-defined]
        return cls(backend, str(tokenizer.name_or_path), int(end), template)

    def ready(self) -> Any:
        """The function ``batch -> list[Encoded | Refused]``, with everything loaded that it needs."""
        if self.template is not None:
            return self._chats()
        if self.backend is not None:
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_str(self.backend)
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return lambda texts: [self._closed(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]
        from nemo_minitron.data.tokenizer import load_tokenizer

        slow = load_tokenizer(self.directory)
        return lambda texts: [
            self._closed(ids) for ids in slow(list(texts), verbose=False, return_attention_mask=False)["input_ids"]
        ]

    def _chats(self) -> Any:
        from nemo_minitron.data.chat.templates import choose_template, render
        from nemo_minitron.data.tokenizer import load_tokenizer

        assert self.template is not None
        tokenizer = load_tokenizer(self.directory)
        template = choose_template(tokenizer, self.template)

        def encode(chats: Sequence[Chat]) -> list[Encoded | Refused]:
            encoded: list[Encoded | Refused] = []
            for chat in chats:
                try:
                    rendered = render(chat, tokenizer, template)
                except BadRecord as error:
                    encoded.append(Refused(error.where, error.reason, chat.record()))
                    continue
                closed = self._closed(rendered.ids).ids
                answers = np.zeros(len(closed), dtype=bool)
                answers[: len(rendered.answers)] = rendered.answers
                encoded.append(Encoded(closed, answers))
            return encoded

        return encode

    def _closed(self, ids: list[int]) -> Encoded:
        if not ids or ids[-1] != self.end:
            ids = [*ids, self.end]
        return Encoded(np.asarray(ids, dtype=np.int32), None)


def encode_all(
    encoder: Encoder, documents: Iterable[tuple[Any, str | Chat, int]], workers: int | None
) -> Iterator[tuple[Any, Encoded | Refused]]:
    """Encode ``(key, document, characters)`` one after the other, giving ``(key, tokens)`` in the same order.

    Args:
        encoder: for text or for conversations, whichever the documents are.
        documents: read as they are needed, some batches ahead of the results.
        workers: processes; 1 encodes in this process. None takes one for each core that this process may use, if there
            is more text than :data:`SMALL_CHARACTERS`.

    Raises:
        DataError: if a worker process dies or raises a DataError.
    """
    batches = _batches(documents)
    ahead: list[list[tuple[Any, Any, int]]] = []
    if workers is None:
        read = 0
        for batch in batches:
            ahead.append(batch)
            read += sum(characters for *_, characters in batch)
            if read > SMALL_CHARACTERS:
                workers = min(len(os.sched_getaffinity(0)), MOST_WORKERS)
                break
    if workers is None or workers == 1:
        encode = encoder.ready()
        for batch in _chain(ahead, batches):
            yield from zip([key for key, *_ in batch], encode([text for _, text, _ in batch]), strict=True)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start, initargs=(encoder,)) as pool:
        running: deque[tuple[list[Any], Future[list[Encoded | Refused]]]] = deque()
        try:
            for batch in _chain(ahead, batches):
                running.append(([key for key, *_ in batch], pool.submit(_encode, [text for _, text, _ in batch])))
                if len(running) > 2 * workers:
                    keys, future = running.popleft()
                    yield from zip(keys, future.result(), strict=True)
            for keys, future in running:
                yield from zip(keys, future.result(), strict=True)
        except BrokenProcessPool:
            raise DataError(
                "a process that tokenises died, as one does that runs out of memory; start again with fewer "
                "data.workers"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _batches(documents: Iterable[tuple[Any, Any, int]]) -> Iterator[list[tuple[Any, Any, int]]]:
    batch: list[tuple[Any, Any, int]] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += document[2]
        if len(batch) == BATCH_ITEMS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _chain(ahead: list[Any], batches: Iterator[Any]) -> Iterator[Any]:
    """Like itertools.chain, but keeps no reference to a batch that has been given out."""
    while ahead:
        yield ahead.pop(0)
    yield from batches


_encode_here: Any = None  # of a worker process


def _start(encoder: Encoder) -> None:
    """Prepare this worker; it ends with its parent, also if the parent was killed."""
    global _encode_here
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process
    parent = parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _encode_here = encoder.ready()


def _encode(batch: list[Any]) -> list[Encoded | Refused]:
    try:
        return _encode_here(batch)  # type: ignore[no-any-return]
    except MinitronError as error:
        raise DataError(str(error)) from None  # plain: it has to be sent
