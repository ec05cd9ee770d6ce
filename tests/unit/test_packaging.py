"""What the package requires: light things alone, and a stack whose parts work together."""

from __future__ import annotations

import io
import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
#: What `pip install nemo-minitron` must neither bring nor replace, and what requires one of them.
PROTECTED = {"torch", "nemo-toolkit", "megatron-core", "nemo-aligner", "transformer-engine", "transformers", "numpy"}
HEAVY = PROTECTED | {"accelerate", "datasets", "gguf", "lightning", "lm-eval", "matplotlib", "pandas", "scipy"}


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def test_dependencies_are_light():
    assert not names(PROJECT["dependencies"]) & HEAVY


def test_light_dependencies_stay_light():
    """Also what they require, as installed here: nothing of it is, or requires, what they must not touch."""
    from importlib import metadata

    seen: set[str] = set()
    todo = names(PROJECT["dependencies"])
    while todo:
        name = todo.pop()
        seen.add(name)
        for text in metadata.requires(name) or []:
            required = Requirement(text)
            if required.marker is None or required.marker.evaluate({"extra": ""}):
                todo |= {canonicalize_name(required.name)} - seen
    assert not seen & HEAVY, seen
    assert {"omegaconf", "antlr4-python3-runtime", "typer"} <= seen


def test_the_stack_has_what_the_parts_have():
    stack = [Requirement(text) for text in EXTRAS["stack"]]
    (own,) = (one for one in stack if one.name == "nemo-minitron")
    assert own.extras | {"stack", "dev", "llama-cpp"} == set(EXTRAS)  # llama.cpp is built from source
    assert PROTECTED - {"transformer-engine"} <= {canonicalize_name(one.name) for one in stack}


def test_constraints_pin_each_requirement_within_its_range():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, version = re.fullmatch(r"([A-Za-z0-9_.-]+)==([^ ;]+)", line).groups()
        assert pins.setdefault(canonicalize_name(name), version) == version, name
    for text in [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)]:
        requirement = Requirement(text)
        if requirement.name != "nemo-minitron":
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


@pytest.mark.slow
def test_a_tokenizer_model_alone_loads(tmp_path):
    """transformers turns it into a fast one through sentencepiece's generated code, which must suit protobuf."""
    import sentencepiece
    import transformers

    model = io.BytesIO()
    lines = (f"the quick brown fox jumps over the lazy dog {number} times" for number in range(200))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, vocab_size=60, model_type="bpe", minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.is_fast
    assert tokenizer.decode(tokenizer.encode("the fox"), skip_special_tokens=True) == "the fox"
