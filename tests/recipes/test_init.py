"""``minitron init`` and ``minitron run`` with a model, text, chats and pairs that nothing here has seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.stranger import make_stranger


def minitron(*words: str | Path, cwd: Path) -> str:
    command = [sys.executable, "-m", "nemo_minitron", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_strangers_model(tmp_path: Path) -> None:
    """Two commands and no edit: an aligned, evaluated, exported student, which transformers opens."""
    it = make_stranger(tmp_path / "theirs")
    assert (it.model / "model.safetensors.index.json").is_file()
    assert {"dtype", "rope_parameters"} <= json.loads((it.model / "config.json").read_text()).keys()

    said = minitron(
        "init", it.model, "--text", it.text, "--chat", it.chats, "--pairs", it.pairs, "--steps", "6",
        "--save", "p.yaml", cwd=tmp_path,
    )  # fmt: skip
    assert "next: minitron run p.yaml" in said
    minitron("run", "p.yaml", cwd=tmp_path)

    run = tmp_path / "runs/p"
    models = json.loads((run / "evaluation/evaluation.json").read_text())["models"]
    assert list(models) == ["teacher", "pruned", "reconstructed", "distilled", "sft", "dpo"]
    teacher, student = models["teacher"]["parameters"], models["dpo"]["parameters"]
    assert student <= 0.6 * teacher
    assert models["distilled"]["loss"] < models["pruned"]["loss"]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run / "export/hf")
    tokenizer = AutoTokenizer.from_pretrained(run / "export/hf")
    assert sum(parameter.numel() for parameter in model.parameters()) == student
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How many apples?"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert model.generate(prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt.shape[1]
    assert "dpo" in (run / "report/report.md").read_text()
    assert (run / "report/index.html").is_file()
