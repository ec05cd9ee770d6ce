"""Tokenizers saved by transformers 5 read here as it reads them, and what is written opened by both generations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support import tokenizers as made
from support.checkpoints import tiny_hf_model
from support.transformers5 import run_transformers5, transformers5

from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
from nemo_minitron.data.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

TESTS = Path(__file__).resolve().parents[1]
SAVE = """
import json, sys, transformers
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from support import tokenizers as made
assert transformers.__version__.startswith("5."), transformers.__version__
folder = Path(sys.argv[1])
single = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
def backend(**more):
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made.byte_level(special=("<s>", "</s>", *made.MARKS, "<img>")),
        bos_token="<s>", eos_token="</s>", extra_special_tokens=made.MARKS, **more
    )
saved = {"backend": backend(), "own-token": backend(image_token="<img>")}
saved["cleaned"] = backend(clean_up_tokenization_spaces=True)
saved["backend"].chat_template = single
saved["named"] = backend()
saved["named"].chat_template = {
    "default": single,
    "tool_use": "tools {{ tools | tojson }} {{ messages[0]['content'] }}",
    "rag": "rag {{ messages[0]['content'] }}",
}
saved["added"] = backend()
saved["added"].add_tokens(["<extra>"])
bpe = json.loads(made.byte_level(special=("<|endoftext|>",)).to_str())["model"]
merges = [tuple(merge) for merge in bpe["merges"]]
saved["qwen2"] = transformers.Qwen2Tokenizer(vocab=bpe["vocab"], merges=merges)
saved["gpt2"] = transformers.GPT2Tokenizer(vocab=bpe["vocab"], merges=merges, add_prefix_space=True)
made.sentencepiece_model(folder / "source" / "tokenizer.model")
saved["llama"] = transformers.LlamaTokenizer.from_pretrained(folder / "source")
for name, tokenizer in saved.items():
    tokenizer.save_pretrained(folder / name)
"""
ANSWER = """
import json, sys, transformers
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from support import tokenizers as made
assert transformers.__version__.startswith("5."), transformers.__version__
folder = Path(sys.argv[1])
load = transformers.AutoTokenizer.from_pretrained
out = {name: made.behaviour(load(folder / name)) for name in sys.argv[3].split(",")}
(folder / "answers.json").write_text(json.dumps(out))
"""
KINDS = ("backend", "own-token", "cleaned", "named", "added", "qwen2", "gpt2", "llama")
#: Forms that transformers 4 knows, in which models come.
OLDER = ("sentencepiece", "sentencepiece-added", "bpe", "fast")


def ask(folder: Path, names: tuple[str, ...]) -> dict:
    run_transformers5(transformers5(), ANSWER, folder, TESTS, ",".join(names))
    return json.loads((folder / "answers.json").read_text())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_model(tmp_path_factory.mktemp("model") / "hf", vocab_size=520)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Tokenizers saved by transformers 5, each beside a model, and in ``answers.json`` what it makes of them."""
    folder = tmp_path_factory.mktemp("saved")
    run_transformers5(transformers5(), SAVE, folder, TESTS)
    for name in KINDS:
        shutil.copytree(model, folder / name, dirs_exist_ok=True)
    ask(folder, KINDS)
    return folder


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Older forms, each beside a model."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("older")
    made.sentencepiece_model(folder / "sentencepiece" / "tokenizer.model")
    shutil.copytree(folder / "sentencepiece", folder / "sentencepiece-added")
    (folder / "sentencepiece-added" / "added_tokens.json").write_text(json.dumps({"<extra>": 400}))
    made.bpe_files(folder / "bpe")
    fast = PreTrainedTokenizerFast(tokenizer_object=made.byte_level(), bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder / "fast")
    for name in OLDER:
        shutil.copytree(model, folder / name, dirs_exist_ok=True)
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_the_stack_reads_what_transformers_5_saved(name, saved):
    before = {file: file.read_bytes() for file in (saved / name).rglob("*") if file.is_file()}
    tokenizer = load_tokenizer(open_checkpoint(saved / name).tokenizer)
    assert made.behaviour(tokenizer) == json.loads((saved / "answers.json").read_text())[name]
    assert {file: file.read_bytes() for file in (saved / name).rglob("*") if file.is_file()} == before


def test_both_generations_read_an_export(saved, older, tmp_path):
    from transformers import AutoTokenizer

    for folder, names in ((saved, KINDS), (older, OLDER)):
        for name in names:
            write_checkpoint(open_checkpoint(folder / name), tmp_path / name, "hf")
    answers = ask(tmp_path, (*KINDS, *OLDER))
    expected = json.loads((saved / "answers.json").read_text())
    for name in OLDER:
        expected[name] = made.behaviour(load_tokenizer(open_checkpoint(older / name).tokenizer))
    for name in (*KINDS, *OLDER):
        assert answers[name] == expected[name], name
        assert made.behaviour(AutoTokenizer.from_pretrained(tmp_path / name)) == expected[name], name


@pytest.mark.parametrize("name", ["named", "llama"])
def test_every_format_carries_it(name, saved, tmp_path):
    expected = json.loads((saved / "answers.json").read_text())[name]
    source = saved / name
    for form in ("nemo2", "nemo", "hf"):
        target = tmp_path / (f"{name}.nemo" if form == "nemo" else form)
        write_checkpoint(open_checkpoint(source), target, form)
        assert made.behaviour(load_tokenizer(open_checkpoint(target).tokenizer)) == expected, form
        source = target
