"""Counting tokens and pruning a vocabulary: the model and its tokenizer, opened by transformers."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import torch
from support.checkpoints import CHAT_TEMPLATE, hf_logits, tiny_hf_model
from support.text import write_jsonl

from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.config import DataConfig, PruneConfig, SourceConfig, TargetConfig, TokensConfig, VocabularyConfig
from nemo_minitron.errors import CheckpointError, DataError, ShapeError
from nemo_minitron.pruning import load_kept
from nemo_minitron.stages import prune, tokens

VERSE = (
    "the lord said unto moses speak unto the children of israel and it came to pass in those days that the word of "
    "the lord came unto the prophet so did the people as was commanded"
)
LINES = [" ".join(random.Random(seed).choices(VERSE.split(), k=12)) for seed in range(120)]
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model of 331 rows, the tokenizer of which has 320 tokens (byte-level BPE), text, and its token counts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    home = tmp_path_factory.mktemp("vocabulary")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(LINES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[3:],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tiny_hf_model(home / "model", vocab_size=331, eos_token_id=[2, 4])
    tokenizer.save_pretrained(home / "model")
    write_jsonl(home / "text.jsonl", LINES)
    home.joinpath("counted").mkdir()
    tokens.run(tokens_config(home, home / "counted" / "tokens"))
    return home


def tokens_config(home, output, **changes):
    data = DataConfig(
        sources=[SourceConfig(name="text", path=str(home / "text.jsonl"))],
        sequence_length=16,
        cache_dir=str(home / "cache"),
    )
    return TokensConfig(**{"model": str(home / "model"), "output": str(output), "data": data} | changes)


def prune_config(home, output, size, **changes):
    frequencies = str(home / "counted" / "tokens")
    settings = {
        "model": str(home / "model"),
        "output": str(output),
        "format": "hf",
        "vocabulary": VocabularyConfig(size=size, frequencies=frequencies),
    }
    return PruneConfig(**settings | changes)


def test_tokens_counts_the_split(home, tmp_path):
    planned = tokens.plan(tokens_config(home, tmp_path / "tokens", blocks=4))
    assert planned.costs["counted"] == "64 tokens of the train split"
    found = tokens.run(tokens_config(home, tmp_path / "tokens", blocks=4))
    lines = (tmp_path / "tokens" / "frequencies.tsv").read_text().splitlines()
    counts = [int(line.split("\t")[1]) for line in lines if not line.startswith("#")]
    assert sum(counts) == found["tokens"] == 64
    assert len(counts) == found["distinct"]
    assert counts == sorted(counts, reverse=True)
    assert 0 < found["coverage"]["25%"] <= found["coverage"]["50%"] <= 1


def test_transformers_opens_the_trimmed_model(home, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = prune.run(prune_config(home, tmp_path / "pruned", 300))
    assert found["shape"]["vocab_size"] == 300
    kept, shape = load_kept(tmp_path / "pruned" / "kept.json")
    assert (shape.vocab_size, len(kept.vocab)) == (331, 300)
    full, trimmed = (AutoTokenizer.from_pretrained(home / "model"), AutoTokenizer.from_pretrained(tmp_path / "pruned"))
    assert (len(full), len(trimmed)) == (320, 300)

    words = [f" {word}" for word in VERSE.split()]
    text = "".join(word for word in words if set(full(word).input_ids) <= set(kept.vocab))
    assert len(text.split()) > 15
    before, after = (one(text, return_tensors="pt").input_ids for one in (full, trimmed))
    assert [kept.vocab[index] for index in after[0]] == before[0].tolist()
    assert torch.equal(hf_logits(tmp_path / "pruned", after), hf_logits(home / "model", before)[:, :, list(kept.vocab)])
    assert trimmed.decode(trimmed.encode("Ωmega: x² 🙂")) == "Ωmega: x² 🙂"
    chat = [{"role": "user", "content": "said unto moses"}]
    assert trimmed.apply_chat_template(chat, tokenize=False) == full.apply_chat_template(chat, tokenize=False)
    assert trimmed.tokenize("<|im_start|>moses<|im_end|>")[0] == "<|im_start|>"

    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    generation = json.loads((tmp_path / "pruned" / "generation_config.json").read_text())
    for one in (config, generation):
        assert one["bos_token_id"] == trimmed.bos_token_id
        assert one["eos_token_id"] == [trimmed.eos_token_id, trimmed.convert_tokens_to_ids("<|im_end|>")]
        assert one["pad_token_id"] == trimmed.pad_token_id
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    written = model.generate(after[:, :4], max_new_tokens=4, do_sample=False)
    assert written.shape[1] > 4
    assert int(written.max()) < 300


def test_width_and_vocabulary_together_and_the_padding_goes(home, tmp_path):
    config = prune_config(home, tmp_path / "pruned", 320, method="random", target=TargetConfig(hidden_size=32))
    assert prune.plan(config).faults == []
    found = prune.run(config)
    assert (found["shape"]["vocab_size"], found["shape"]["hidden_size"]) == (320, 32)
    pruned = open_checkpoint(tmp_path / "pruned")
    embedding = pruned.weights.tensor("embedding.word_embeddings.weight")
    full = open_checkpoint(home / "model").weights.tensor("embedding.word_embeddings.weight")
    kept, _ = load_kept(tmp_path / "pruned" / "kept.json")
    assert kept.vocab == tuple(range(320))
    assert torch.equal(embedding, full[:320, list(kept.hidden)])


def test_refusals(home, tmp_path):
    def refused(error, message, size=300, **changes):
        with pytest.raises(error, match=message):
            prune.run(prune_config(home, tmp_path / "pruned", size, **changes))
        assert not (tmp_path / "pruned").exists()

    refused(ShapeError, r"vocabulary.size=12: must lie between 261 .* and 320", 12)
    refused(ShapeError, "vocabulary.size=325: must lie between", 325)
    refused(ShapeError, "vocab_size=332: the model has only 331", 332)
    other = tmp_path / "other.tsv"
    other.write_text("# tokenizer: 0123456789abcdef\n1\t2\n")
    refused(DataError, "counted with another tokenizer", vocabulary=VocabularyConfig(300, str(other)))
    tiny_hf_model(tmp_path / "bare")
    refused(CheckpointError, "carries no tokenizer", 100, model=str(tmp_path / "bare"))
    with pytest.raises(CheckpointError, match="carries no tokenizer to count with"):
        tokens.run(tokens_config(home, tmp_path / "tokens", model=str(tmp_path / "bare")))
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (home / "model" / file).is_file():
            (tmp_path / "bare" / file).write_bytes((home / "model" / file).read_bytes())
    content = json.loads((tmp_path / "bare" / "tokenizer.json").read_text())
    content["model"]["type"] = "Unknown"
    (tmp_path / "bare" / "tokenizer.json").write_text(json.dumps(content))
    tiny_hf_model(tmp_path / "bare", vocab_size=331)
    refused(CheckpointError, "type Unknown cannot be trimmed", model=str(tmp_path / "bare"))


def test_a_layout_that_the_student_could_not_have(home, tmp_path):
    prune.run(prune_config(home, tmp_path / "known", 320))  # what we write states its shape to the plans
    config = PruneConfig(
        model=str(tmp_path / "known"),
        output=str(tmp_path / "pruned"),
        method="random",
        target=TargetConfig(ffn_hidden_size=70),
        format="hf",
    )
    config = dataclasses.replace(config, student_layout=dataclasses.replace(config.student_layout, tensor=4))
    wanted = r"student_layout: ffn_hidden_size=70 cannot be split over parallel.tensor=4; it fits .*\[1, 2, 5, 7"
    assert any("student_layout: num_query_groups=2" in fault for fault in prune.plan(config).faults)
    with pytest.raises(ShapeError, match=wanted):
        prune.run(config)
