"""An engine in a process of its own, so that its memory is its own and nothing of another model is in it.

``python -m nemo_minitron.serving.process`` is that process. It reads a request a line from its standard input, JSON,
and answers each with a line; what libraries print goes to its log.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from nemo_minitron import errors
from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs.launch import end_with_launcher, launched_here
from nemo_minitron.runtime.environment import local_environment
from nemo_minitron.runtime.memory import peak_gpu_bytes, peak_rss_bytes
from nemo_minitron.serving.engine import Engine, Options, Timing
from nemo_minitron.serving.engines import open_engine

__all__ = ["EngineProcess", "Memory"]


@dataclass(frozen=True)
class Memory:
    """Memory of an engine's process, in bytes.

    Attributes:
        peak: largest resident size, from the start of the process on. Files that are mapped into memory count as far
            as they were touched.
        libraries: resident size before the model was loaded, with the engine's libraries imported.
        gpu: most that tensors took of the GPU; 0 without one. What llama.cpp takes of it is not known.
    """

    peak: int
    libraries: int
    gpu: int


class EngineProcess:
    """Starts the process and loads the model; leaving the ``with`` block ends it.

    Args:
        engine: name of the engine.
        path: of the model.
        options: of the engine.
        log: file for what the process prints.
    """

    def __init__(self, engine: str, path: str | Path, options: Options, log: Path) -> None:
        self.engine, self.path, self.log = engine, str(path), log
        environment = {
            **local_environment(os.environ),
            **launched_here(),
            "OMP_NUM_THREADS": str(options.threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "nemo_minitron.serving.process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=environment,
                text=True,
            )
        self._send({"engine": engine, "path": self.path, "options": asdict(options)})
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self) -> dict[str, Any]:
        """Wait until the model is loaded.

        Returns:
            ``version, device, vocab_size, parameters, weights`` of the engine.

        Raises:
            MinitronError: if it cannot be loaded, or the process ends.
        """
        self.facts = self._receive()
        return self.facts

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[Timing, list[list[int]]]:
        """See :class:`~nemo_minitron.serving.engine.Engine`."""
        answer = self._ask({"do": "generate", "prompts": prompts, "new_tokens": new_tokens})
        return Timing(*answer["timing"]), answer["tokens"]

    def losses(self, blocks: Sequence[Sequence[int]]) -> list[float]:
        """See :class:`~nemo_minitron.serving.engine.Engine`."""
        return self._ask({"do": "losses", "blocks": blocks})["losses"]

    def memory(self) -> Memory:
        """What it took until now."""
        return Memory(**self._ask({"do": "memory"}))

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._send(request)
        return self._receive()

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer, or its lack, says why
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            code = self._process.wait()
            tail = self.log.read_text(errors="replace").strip().splitlines()[-8:]
            raise MinitronError(
                f"{self.path} in {self.engine}: its process ended with code {code}"
                + (" (killed: too little memory?)" if code == -9 else "")
                + "".join(f"\n  {text}" for text in tail)
            )
        answer: dict[str, Any] = json.loads(line)
        if "refused" in answer:
            kind = getattr(errors, answer["kind"], MinitronError)
            raise kind(answer["refused"])
        if "crashed" in answer:
            raise RuntimeError(f"{self.path} in {self.engine}:\n{answer['crashed']}")
        return answer


def main() -> None:
    """Answer requests until the input ends."""
    end_with_launcher()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    engine: Engine | None = None
    libraries = 0
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if engine is None:
                options = Options(**request["options"])
                _import(request["engine"], options)
                libraries = peak_rss_bytes()
                engine = open_engine(request["engine"], request["path"], options)
                names = ("version", "device", "vocab_size", "parameters", "weights")
                _answer(answers, {name: getattr(engine, name) for name in names})
            else:
                _answer(answers, _done(engine, request, libraries))
        except MinitronError as error:
            _answer(answers, {"refused": str(error), "kind": type(error).__name__})
        except Exception:
            _answer(answers, {"crashed": traceback.format_exc()})
    answers.flush()
    os._exit(0)  # an ordinary exit takes seconds


def _done(engine: Engine, request: dict[str, Any], libraries: int) -> dict[str, Any]:
    if request["do"] == "generate":
        timing, tokens = engine.generate(request["prompts"], request["new_tokens"])
        return {"timing": [timing.first, timing.further], "tokens": tokens}
    if request["do"] == "losses":
        return {"losses": engine.losses(request["blocks"])}
    return asdict(Memory(peak_rss_bytes(), libraries, peak_gpu_bytes()))


def _import(engine: str, options: Options) -> None:
    """What an engine imports, so that the memory of the libraries can be told from the model's."""
    import random

    random.seed(options.seed)
    if engine == "llama.cpp":
        with contextlib.suppress(ImportError):  # said when it is opened
            import llama_cpp  # noqa: F401
        return
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    if engine == "transformers":
        from transformers import AutoModelForCausalLM  # noqa: F401
    else:
        from nemo_minitron.runtime import cpu

        cpu.prepare(options.device)
        from megatron.core.models.gpt import GPTModel  # noqa: F401


def _answer(stream: IO[str], answer: dict[str, Any]) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
