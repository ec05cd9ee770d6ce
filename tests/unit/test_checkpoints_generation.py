"""``generation_config.json`` goes through every format and stage, and its end tokens end answers."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import tiny_checkpoint, tokens

from nemo_minitron.alignment.export import trained_checkpoint
from nemo_minitron.architecture import Architecture
from nemo_minitron.axes import KeptUnits
from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
from nemo_minitron.checkpoints.fingerprint import model_fingerprint
from nemo_minitron.checkpoints.model_record import read_model_record
from nemo_minitron.checkpoints.tokenizer.trimming import renumber
from nemo_minitron.errors import CheckpointError, ShapeError
from nemo_minitron.pruning import prune_weights

#: As Llama-3-Instruct's and Qwen's are: more end tokens than ``config.json`` (2), another padding token (0).
GENERATION: dict[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
    "pad_token_id": 4,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "somebody's own": [1, 2],
}


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    model = tiny_checkpoint(tmp_path / "hf")
    content = {**GENERATION, "_from_model_config": True, "transformers_version": "4.40.0"}
    (model / "generation_config.json").write_text(json.dumps(content))
    return model


def generation_of(model: Path) -> dict[str, Any]:
    return json.loads((model / "generation_config.json").read_text())


@pytest.mark.parametrize("form", ["hf", pytest.param("nemo2", marks=pytest.mark.slow), "nemo"])
def test_every_format_carries_it(hf: Path, tmp_path: Path, form: str) -> None:
    source = open_checkpoint(hf)
    assert source.architecture.eos_token_id == 2
    assert source.architecture.end_tokens == [2, 5]
    between = write_checkpoint(source, tmp_path / f"between{'.nemo' if form == 'nemo' else ''}", form)
    assert between.architecture == source.architecture
    write_checkpoint(between, tmp_path / "out", "hf")
    assert generation_of(tmp_path / "out") == GENERATION
    assert open_checkpoint(tmp_path / "out").architecture == source.architecture


def test_pruned_and_trained_models_keep_it(hf: Path, tmp_path: Path) -> None:
    source = open_checkpoint(hf)
    pruned = prune_weights(source, KeptUnits.everything(source.shape))
    assert pruned.architecture.generation == source.architecture.generation
    write_checkpoint(source, tmp_path / "model.nemo", "nemo")
    with tarfile.open(tmp_path / "model.nemo") as archive:
        archive.extractall(tmp_path / "last", filter="data")
    trained = trained_checkpoint(source, tmp_path / "last" / "model_weights", tokenizer=hf, lineage={})
    write_checkpoint(trained, tmp_path / "trained", "hf")
    assert generation_of(tmp_path / "trained") == GENERATION


def test_what_says_no_more_than_the_configuration_is_not_kept(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "hf")
    assert generation_of(model)["_from_model_config"]
    made = {"output_attentions": False, "output_hidden_states": False, "use_cache": True}  # by transformers 5
    (model / "generation_config.json").write_text(json.dumps(generation_of(model) | made))
    source = open_checkpoint(model)
    assert source.architecture.generation == {}
    assert "generation" not in source.architecture.to_dict()
    write_checkpoint(source, tmp_path / "out", "hf")
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert generation_of(tmp_path / "out") == {"_from_model_config": True, **ids}


def test_the_model_is_the_same_to_caches(hf: Path) -> None:
    with_it = model_fingerprint(open_checkpoint(hf))
    (hf / "generation_config.json").unlink()
    assert model_fingerprint(open_checkpoint(hf)) == with_it


def test_records_without_it_are_read(hf: Path, tmp_path: Path) -> None:
    write_checkpoint(open_checkpoint(hf), tmp_path / "out", "hf")
    file = tmp_path / "out" / "minitron.json"
    content = json.loads(file.read_text())
    del content["architecture"]["generation"]
    file.write_text(json.dumps(content))
    record = read_model_record(tmp_path / "out")
    assert record is not None
    assert record.architecture.generation == {}


def test_an_export_stops_where_its_model_did(hf: Path, tmp_path: Path) -> None:
    """By the library that the export is made for: the greedy third token becomes an end token."""
    from transformers import AutoModelForCausalLM

    ids = tokens(rows=1, length=5)

    def answer(model: Path) -> list[int]:
        loaded = AutoModelForCausalLM.from_pretrained(model)
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "do_sample": False}
        return loaded.generate(ids, **given)[0, 5:].tolist()

    (hf / "generation_config.json").write_text(json.dumps({"eos_token_id": [2]}))
    free = answer(hf)
    assert len(free) > 3
    (hf / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, free[2]]}))
    write_checkpoint(open_checkpoint(hf), tmp_path / "out", "hf")
    assert answer(tmp_path / "out") == answer(hf) == free[: free.index(free[2]) + 1]


@pytest.mark.parametrize("value", ["</s>", [2, None], -1, True, 2.5])
def test_end_tokens_that_are_none(hf: Path, value: Any) -> None:
    (hf / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id=.* is no token id"):
        open_checkpoint(hf)


def test_a_trimmed_vocabulary_renumbers_it() -> None:
    generation = {
        "eos_token_id": [5, 9],
        "pad_token_id": 3,
        "suppress_tokens": [1, 4],
        "bad_words_ids": [[1, 3], [4]],
        "top_k": 5,
    }
    architecture = Architecture(bos_token_id=3, eos_token_id=5, generation=generation)
    left = renumber(architecture, (1, 3, 5, 9))
    assert left.end_tokens == [2, 3]
    assert left.generation == {
        "eos_token_id": [2, 3],
        "pad_token_id": 1,
        "suppress_tokens": [0],
        "bad_words_ids": [[0, 1]],
        "top_k": 5,
    }
    with pytest.raises(ShapeError, match="eos_token_id"):
        renumber(architecture, (1, 3, 5))
    with pytest.raises(ShapeError, match="sequence_bias"):
        renumber(Architecture(generation={"sequence_bias": [[[1], 2.0]]}), (1,))
