"""Exports opened by vLLM: the CPU build, in an environment of its own that ``MINITRON_VLLM_PYTHON`` names."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from support.checkpoints import hf_logits, tiny_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SCRIPT = """
import json, os, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    answers = {}
    for folder in sys.argv[3:]:
        engine = LLM(model=folder, dtype="float32", max_model_len=48, enforce_eager=True, seed=0)
        sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in json.loads(sys.argv[1])], sampling)
        defaults = engine.get_default_sampling_params()
        answers[folder] = {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "logprobs": [
                [step[token].logprob for step, token in zip(output.outputs[0].logprobs, output.outputs[0].token_ids)]
                for output in outputs
            ],
            "top_p": defaults.top_p,
            "head_dim": engine.llm_engine.model_config.get_head_size(),
            "vocab_size": engine.llm_engine.model_config.get_vocab_size(),
            "template": engine.get_tokenizer().chat_template,
        }
        del engine
    open(sys.argv[2], "w").write(json.dumps(answers))
    sys.stdout.flush()
    os._exit(0)
"""

#: hidden / heads is 24, and the heads have 32; the vocabulary is no multiple of anything.
SIZES = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "num_hidden_layers": 2}
PROMPTS = [[5, 9, 11, 40], [1, 77, 8, 9, 10, 130]]


def test_exports_answer_as_transformers_does(tmp_path: Path) -> None:
    """A pruned student: greedy tokens, their log-probabilities, and what the folder says beside the weights."""
    import torch

    from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
    from nemo_minitron.importance import magnitude_scores
    from nemo_minitron.pruning import choose_units, prune_weights

    python = os.environ.get("MINITRON_VLLM_PYTHON")
    if python is None:
        pytest.skip("vLLM is not here: MINITRON_VLLM_PYTHON names no Python that has it")
    path = tiny_checkpoint(tmp_path / "teacher", **SIZES)
    (path / "generation_config.json").write_text(json.dumps({"top_p": 0.8, "eos_token_id": [2, 5]}))
    teacher = write_checkpoint(open_checkpoint(path), tmp_path / "nemo2", "nemo2")  # its vocabulary is padded
    kept = choose_units(magnitude_scores(teacher), teacher.shape, teacher.shape.replace(hidden_size=40))
    folder = tmp_path / "hf"
    write_checkpoint(prune_weights(teacher, kept), folder, "hf")
    done = subprocess.run(
        [python, "-c", SCRIPT, json.dumps(PROMPTS), str(tmp_path / "answers.json"), str(folder)],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True, text=True, timeout=880, check=False,
    )  # fmt: skip
    assert (tmp_path / "answers.json").is_file(), done.stdout[-2000:] + done.stderr[-3000:]
    answer = json.loads((tmp_path / "answers.json").read_text())[str(folder)]
    for number, prompt in enumerate(PROMPTS):
        ids, logprobs = list(prompt), []
        for _ in range(8):
            row = hf_logits(folder, torch.tensor([ids]))[0, -1].log_softmax(-1)
            ids.append(int(row.argmax()))
            logprobs.append(float(row.max()))
        assert answer["tokens"][number] == ids[len(prompt) :]
        assert answer["logprobs"][number] == pytest.approx(logprobs, abs=1e-3)
    assert (answer["head_dim"], answer["vocab_size"], answer["top_p"]) == (32, 131, 0.8)
    assert answer["template"] == json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
