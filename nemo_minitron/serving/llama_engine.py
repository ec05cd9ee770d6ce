"""llama.cpp, by its own C interface through llama-cpp-python."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_minitron.errors import CheckpointError
from nemo_minitron.serving.engine import Options, Timing

__all__ = ["LlamaEngine"]

#: Tokens of one call at most: llama.cpp's own default (``n_batch`` of its command line).
_BATCH = 2048


class LlamaEngine:
    """A GGUF file. On a device with CUDA all layers are there, where llama.cpp was built with it.

    Raises:
        CheckpointError: if llama.cpp cannot load it.
    """

    name = "llama.cpp"

    def __init__(self, path: Path, options: Options) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        llama_cpp.llama_log_set(_log, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        offloads = options.device != "cpu" and llama_cpp.llama_supports_gpu_offload()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 999 if offloads else 0
        _lines.clear()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self.model:
            raise CheckpointError(f"{path}: llama.cpp cannot load it ({_reason() or 'it gives no reason'})")
        self._vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self._options = options
        self._context = self._open(options.context, options.batch_size)
        self.version, self.device = f"llama-cpp-python {llama_cpp.__version__}", "cuda" if offloads else "cpu"
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(self._vocabulary))
        self.parameters = int(llama_cpp.llama_model_n_params(self.model))
        self.weights = self._kind()

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[Timing, list[list[int]]]:
        """See :class:`~nemo_minitron.serving.engine.Engine`."""
        rows, length = len(prompts), len(prompts[0])
        answers: list[list[int]] = [[] for _ in prompts]
        began = time.perf_counter()
        self._clear()
        last: list[np.ndarray] = []
        for row, prompt in enumerate(prompts):
            last.append(self._run(prompt, row, 0, every=False)[-1])
        first = began
        for step in range(1 + new_tokens):
            for answer, logits in zip(answers, last, strict=True):
                answer.append(int(logits.argmax()))
            if step == 0:
                first = time.perf_counter()
            if step < new_tokens:
                last = self._step([answer[-1] for answer in answers], length + step)
        return Timing(first - began, time.perf_counter() - first), answers[:rows]

    def losses(self, blocks: Sequence[Sequence[int]]) -> list[float]:
        """See :class:`~nemo_minitron.serving.engine.Engine`."""
        losses = []
        for block in blocks:
            self._clear()
            logits = self._run(block[:-1], 0, 0, every=True).astype(np.float64)
            top = logits.max(axis=1)
            total = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
            losses.append(float((total - logits[np.arange(len(logits)), np.asarray(block[1:])]).mean()))
        return losses

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """``[s, V]`` float32 logits after each of the tokens."""
        self._clear()
        return self._run(tokens, 0, 0, every=True)

    def _open(self, context: int, rows: int) -> Any:
        settings = self._api.llama_context_default_params()
        settings.n_ctx = rows * (context + 32)
        settings.n_batch = settings.n_ubatch = min(_BATCH, max(settings.n_ctx, rows))
        settings.n_ubatch = min(512, settings.n_batch)
        settings.n_seq_max = rows
        settings.n_threads = settings.n_threads_batch = self._options.threads
        opened = self._api.llama_init_from_model(self.model, settings)
        if not opened:
            raise CheckpointError(f"llama.cpp cannot make a context of {settings.n_ctx} tokens ({_reason()})")
        return opened

    def _clear(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def _run(self, tokens: Sequence[int], row: int, start: int, *, every: bool) -> np.ndarray:
        """Logits after ``tokens`` of a sequence, of each ``[s, V]`` or of the last ``[1, V]``."""
        parts = []
        for begin in range(0, len(tokens), _BATCH):
            part = tokens[begin : begin + _BATCH]
            end = begin + len(part) == len(tokens)
            wanted = [every or (end and place == len(part) - 1) for place in range(len(part))]
            places = range(start + begin, start + begin + len(part))
            entries = zip(part, places, [row] * len(part), wanted, strict=True)
            parts += self._decode(list(entries))
        return np.stack(parts)

    def _step(self, tokens: Sequence[int], position: int) -> list[np.ndarray]:
        """``[V]`` logits of each sequence after one further token of it."""
        return self._decode([(token, position, row, True) for row, token in enumerate(tokens)])

    def _decode(self, entries: Sequence[tuple[int, int, int, bool]]) -> list[np.ndarray]:
        """Run ``(token, position, sequence, whether its logits are wanted)``; the logits ``[V]`` of those wanted."""
        batch = self._api.llama_batch_init(len(entries), 0, 1)
        try:
            batch.n_tokens = len(entries)
            for place, (token, position, row, wanted) in enumerate(entries):
                batch.token[place], batch.pos[place] = token, position
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
                batch.logits[place] = wanted
            code = self._api.llama_decode(self._context, batch)
            if code:
                raise CheckpointError(f"llama.cpp ends with code {code} ({_reason() or 'it gives no reason'})")
            return [
                np.ctypeslib.as_array(self._api.llama_get_logits_ith(self._context, place), (self.vocab_size,)).copy()
                for place, entry in enumerate(entries)
                if entry[3]
            ]
        finally:
            self._api.llama_batch_free(batch)

    def _kind(self) -> str:
        """What the file says of its numbers, as llama.cpp describes it: "llama 135M Q8_0" -> "Q8_0"."""
        text = ctypes.create_string_buffer(256)
        self._api.llama_model_desc(self.model, text, 256)
        return text.value.decode().split(" ", 2)[-1].removeprefix("all ")


#: The last lines that llama.cpp printed; they say why it refused something.
_lines: list[str] = []


def _note(_level: int, text: bytes, _data: Any) -> None:
    _lines.append(text.decode(errors="replace").strip())
    del _lines[:-20]


def _reason() -> str:
    """The first fault among them, which those after it follow from."""
    return next((line for line in _lines if "error" in line.lower() or "fail" in line.lower()), "")


def _callback() -> Any:
    import llama_cpp

    return llama_cpp.llama_log_callback(_note)


_log = _callback()  # llama.cpp keeps a pointer to it
