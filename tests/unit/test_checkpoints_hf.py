"""The Hugging Face format: names, configuration, sharding, and every way in which a HF directory can be broken."""

from __future__ import annotations

import dataclasses
import json
import os
from importlib import metadata
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.checkpoints import TINY, hf_logits, tiny_checkpoint, tiny_hf_model, tiny_tokenizer, tokens

from nemo_minitron import axes
from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
from nemo_minitron.checkpoints.formats.huggingface import names as naming
from nemo_minitron.checkpoints.formats.huggingface.shards import ShardWriter, plan_shards
from nemo_minitron.config.parts import parse_bytes
from nemo_minitron.errors import CheckpointError


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "hf")


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def test_opens_with_sizes_and_constants(hf: Path) -> None:
    checkpoint = open_checkpoint(hf)
    shape = checkpoint.shape
    assert (shape.num_layers, shape.hidden_size, shape.ffn_hidden_size) == (3, 48, 76)
    assert (shape.num_attention_heads, shape.num_query_groups, shape.head_dim) == (6, 2, 12)
    assert shape.vocab_size == 131
    assert not shape.tied_embeddings
    assert checkpoint.architecture.rotary_base == 20000.0
    assert checkpoint.architecture.dtype == "float32"
    assert checkpoint.tokenizer == hf


def test_qkv_rows_go_group_by_group(hf: Path) -> None:
    stored = load_file(hf / "model.safetensors")
    merged = open_checkpoint(hf).weights.tensor("decoder.layers.1.self_attention.linear_qkv.weight")
    query = stored["model.layers.1.self_attn.q_proj.weight"]
    key = stored["model.layers.1.self_attn.k_proj.weight"]
    value = stored["model.layers.1.self_attn.v_proj.weight"]
    by_hand = [query[:36], key[:12], value[:12], query[36:], key[12:], value[12:]]
    assert torch.equal(merged, torch.cat(by_hand))


def test_split_undoes_merge_bit_for_bit(hf: Path) -> None:
    checkpoint = open_checkpoint(hf)
    for name in checkpoint.weights.names():
        row = axes.parameter(checkpoint.family, name).axes
        tensor = checkpoint.weights.tensor(name)
        assert torch.equal(naming.merge(row, naming.split(row, tensor, checkpoint.shape), checkpoint.shape), tensor)


@pytest.mark.parametrize("tied", [False, True])
def test_written_directory_is_the_same_model(tmp_path: Path, tied: bool) -> None:
    source = tiny_checkpoint(tmp_path / "source", tied=tied)
    seen: list[tuple[str, int, int]] = []
    written = write_checkpoint(open_checkpoint(source), tmp_path / "out", "hf", progress=lambda *a: seen.append(a))
    assert torch.equal(hf_logits(tmp_path / "out", tokens()), hf_logits(source, tokens()))
    assert written.shape.tied_embeddings is tied
    assert seen[-1][1] == seen[-1][2] == len(written.weights.names())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["head_dim"] == 12
    assert config["transformers_version"] == metadata.version("transformers")
    assert (tmp_path / "out" / "generation_config.json").is_file()
    from transformers import AutoTokenizer

    chat = [{"role": "user", "content": "w1 w2"}]
    before, after = (AutoTokenizer.from_pretrained(path) for path in (source, tmp_path / "out"))
    assert after.apply_chat_template(chat, tokenize=False) == before.apply_chat_template(chat, tokenize=False)
    assert after("w5 w9").input_ids == before("w5 w9").input_ids


LAYER = 4 * (48 * (6 + 2 * 2) * 12 + 48 * 72 + 3 * 48 * 76 + 2 * 48)
"""Bytes of a layer of the tiny model in float32."""


def test_shards_are_filled_up_to_the_limit(hf: Path, tmp_path: Path) -> None:
    written = write_checkpoint(open_checkpoint(hf), tmp_path / "out", "hf", max_shard_size=LAYER)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    largest_tensor = 4 * 48 * 131
    held = [sum(tensor.nbytes for tensor in load_file(shard).values()) for shard in shards]
    assert len(shards) > 1
    assert all(LAYER - largest_tensor < size <= LAYER for size in held[:-1])
    assert LAYER // 8 <= held[-1] <= LAYER
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert index["metadata"]["total_size"] == sum(held)
    assert all(name in load_file(tmp_path / "out" / file) for name, file in index["weight_map"].items())
    assert torch.equal(hf_logits(tmp_path / "out", tokens()), hf_logits(hf, tokens()))
    assert written.lineage == {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_file_is_what_the_safetensors_library_writes(hf: Path, tmp_path: Path, dtype: str) -> None:
    from safetensors import safe_open

    written = write_checkpoint(open_checkpoint(hf), tmp_path / "out", "hf", dtype=dtype)
    file, source = tmp_path / "out" / "model.safetensors", load_file(hf / "model.safetensors")
    stored = load_file(file)
    assert stored.keys() == source.keys()
    for name, tensor in source.items():
        assert torch.equal(stored[name], tensor.to(getattr(torch, dtype))), name
    with safe_open(file, framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}
    assert written.architecture.dtype == dtype


@given(
    st.lists(st.one_of(st.integers(1, 40), st.integers(100, 400)), min_size=1, max_size=40),
    st.integers(100, 1000),
)
def test_plans_of_shards_keep_order_and_limit(sizes: list[int], limit: int) -> None:
    named = {str(index): size for index, size in enumerate(sizes)}
    plan = plan_shards(named, limit)
    assert [name for shard in plan for name in shard] == list(named)
    for shard in plan:
        held = [named[name] for name in shard]
        # above the limit there is one tensor, behind little else
        assert sum(held) <= limit or (held[-1] > limit and sum(held[:-1]) < limit / 8)
    if sum(sizes) <= limit:
        assert len(plan) == 1


def test_no_shard_is_left_small() -> None:
    assert plan_shards({"embedding": 2000, "norm": 1, "output": 2000, "layer": 500}, 1000) == [
        ["embedding"],
        ["norm", "output"],
        ["layer"],
    ]
    assert plan_shards({**{str(index): 100 for index in range(10)}, "norm": 1}, 1000) == [
        [str(index) for index in range(5)],
        [*(str(index) for index in range(5, 10)), "norm"],
    ]
    assert plan_shards({"a": 100, "b": 900, "norm": 1}, 1000) == [["a"], ["b", "norm"]]


def test_a_tensor_out_of_turn_or_missing_is_refused(tmp_path: Path) -> None:
    shapes = {"a": (2, 3), "b": (4,)}
    with (
        pytest.raises(CheckpointError, match=r"b, \[4\] in torch.float32, came where the header says a, \[2, 3\]"),
        ShardWriter(tmp_path, shapes, "float32", 100) as shards,
    ):
        shards.write("b", torch.zeros(4))
    with (
        pytest.raises(CheckpointError, match="b was not written"),
        ShardWriter(tmp_path, shapes, "float32", 100) as shards,
    ):
        shards.write("a", torch.zeros(2, 3))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_files_get_the_mode_that_the_umask_says(hf: Path, tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_checkpoint(open_checkpoint(hf), tmp_path / "out", "hf")
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {oct(mode)}


def test_sizes_of_shards_are_refused_by_value(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="max_shard_size: '5 apples' is not a size"):
        write_checkpoint(open_checkpoint(hf), tmp_path / "out", "hf", max_shard_size="5 apples")
    assert [parse_bytes(text) for text in ("5GB", "512MiB", "1.5 kb", "10")] == [5 * 10**9, 2**29, 1500, 10]


def test_one_shard_has_the_plain_name(hf: Path, tmp_path: Path) -> None:
    write_checkpoint(open_checkpoint(hf), tmp_path / "out", "hf")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_reads_its_own_shards_and_torch_files(hf: Path, tmp_path: Path) -> None:
    first = open_checkpoint(hf)
    sharded = write_checkpoint(first, tmp_path / "sharded", "hf", max_shard_size=LAYER)
    old = tmp_path / "bin"
    tiny_hf_model(old)
    torch.save(load_file(old / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    for other in (sharded, open_checkpoint(old)):
        for name in first.weights.names():
            assert torch.equal(first.weights.tensor(name), other.weights.tensor(name)), name


def test_dtype_is_the_stored_one_and_can_be_changed(tmp_path: Path) -> None:
    source = tiny_hf_model(tmp_path / "source", dtype="bfloat16")
    edit_config(source, torch_dtype="float32")  # the file lies about itself
    checkpoint = open_checkpoint(source)
    assert checkpoint.architecture.dtype == "bfloat16"
    assert write_checkpoint(checkpoint, tmp_path / "same", "hf").architecture.dtype == "bfloat16"
    wide = write_checkpoint(checkpoint, tmp_path / "wide", "hf", dtype="float32")
    assert wide.architecture.dtype == "float32"
    with pytest.raises(CheckpointError, match="int4"):
        write_checkpoint(checkpoint, tmp_path / "no", "hf", dtype="int4")


def test_lineage_and_record_travel(hf: Path, tmp_path: Path) -> None:
    checkpoint = dataclasses.replace(open_checkpoint(hf), lineage={"teacher": "a"})
    assert write_checkpoint(checkpoint, tmp_path / "out", "hf").lineage == {"teacher": "a"}
    edit_config(tmp_path / "out", tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"minitron\.json describes"):
        open_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; supported: LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"sliding_window": 16}, "sliding_window=16"),
        ({"num_key_value_heads": 4}, "not a multiple"),
        ({"num_hidden_layers": 4}, "tensors that config.json asks for are missing"),
        ({"num_hidden_layers": 2}, "have no place"),
        ({"intermediate_size": 80}, "has shape"),
        ({"vocab_size": 140}, "has shape"),
        ({"hidden_size": "wide"}, "hidden_size=wide"),
    ],
)
def test_configurations_that_do_not_fit_are_named(hf: Path, changes: dict[str, object], message: str) -> None:
    edit_config(hf, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(hf)


def test_mistral_without_a_window_is_a_llama(hf: Path, tmp_path: Path) -> None:
    edit_config(hf, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=None)
    write_checkpoint(open_checkpoint(hf), tmp_path / "out", "hf")
    assert torch.equal(hf_logits(tmp_path / "out", tokens()), hf_logits(hf, tokens()))
    config = json.loads((hf / "config.json").read_text())
    del config["sliding_window"]  # transformers then takes 4096
    (hf / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    assert open_checkpoint(hf).architecture.sliding_window == 4096


def test_missing_path_empty_directory_unknown_format(tmp_path: Path, hf: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="it is empty"):
        open_checkpoint(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="format 'onnx' is not known"):
        write_checkpoint(open_checkpoint(hf), tmp_path / "out", "onnx")
    with pytest.raises(CheckpointError, match="vocab_multiple=0"):
        write_checkpoint(open_checkpoint(hf), tmp_path / "out", "nemo2", vocab_multiple=0)


def test_truncated_and_missing_files(hf: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    write_checkpoint(open_checkpoint(hf), sharded, "hf", max_shard_size=LAYER)
    first = sorted(sharded.glob("model-*.safetensors"))[0]
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=f"{first.name} is truncated"):
        open_checkpoint(sharded)
    first.unlink()
    with pytest.raises(CheckpointError, match=f"{first.name} is missing"):
        open_checkpoint(sharded)
    (hf / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="but no weights"):
        open_checkpoint(hf)
    (hf / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        open_checkpoint(hf)


def test_a_file_of_torch_before_1_6(hf: Path) -> None:
    """No zip archive: it is read whole, and nothing else of it is taken than tensors."""
    expected = load_file(hf / "model.safetensors")
    file = hf / "pytorch_model.bin"
    (hf / "model.safetensors").unlink()
    torch.save(expected, file, _use_new_zipfile_serialization=False)
    read = open_checkpoint(hf).weights
    norm = "decoder.final_layernorm.weight"
    assert torch.equal(read.tensor(norm), expected["model.norm.weight"])
    assert torch.equal(read.tensor("embedding.word_embeddings.weight"), expected["model.embed_tokens.weight"])
    content = file.read_bytes()
    for cut in (1, len(content) // 2, len(content) - 9):
        file.write_bytes(content[:cut])
        with pytest.raises(CheckpointError, match=f"{file} is truncated or holds more than tensors") as caught:
            open_checkpoint(hf)
        assert "\n" not in str(caught.value)


def test_a_flipped_bit_of_what_was_written_is_seen(hf: Path, tmp_path: Path) -> None:
    """By the checksums in the model record, as a tensor is read; where it is gone, the values are taken as they are."""
    out = tmp_path / "out"
    write_checkpoint(open_checkpoint(hf), out, "hf")
    file = out / "model.safetensors"
    content = bytearray(file.read_bytes())
    expected = load_file(file)["model.layers.1.self_attn.k_proj.weight"]
    content[content.index(expected.numpy().tobytes()) + 5] ^= 4
    file.write_bytes(content)
    read = open_checkpoint(out)
    read.weights.tensor("decoder.layers.0.self_attention.linear_qkv.weight")
    with pytest.raises(
        CheckpointError, match=rf"{file}: model.layers.1.self_attn.q_proj.weight is not what was written"
    ):
        read.weights.tensor("decoder.layers.1.self_attention.linear_qkv.weight")
    (out / "minitron.json").unlink()
    open_checkpoint(out).weights.tensor("decoder.layers.1.self_attention.linear_qkv.weight")


def test_a_torch_file_with_code_in_it_is_refused(hf: Path, tmp_path: Path) -> None:
    import os

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    (hf / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil()}, hf / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        open_checkpoint(hf)
    assert not (tmp_path / "executed").exists()


def test_an_index_cannot_point_outside(hf: Path, tmp_path: Path) -> None:
    (hf / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        open_checkpoint(hf)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    source = tiny_hf_model(tmp_path / "source")
    tiny_tokenizer(source, size=TINY["vocab_size"] + 1)
    with pytest.raises(CheckpointError, match="has 132 tokens but the embedding has only 131 rows"):
        open_checkpoint(source)
    tiny_tokenizer(source, size=TINY["vocab_size"] - 1)
    assert open_checkpoint(source).tokenizer == source
    (source / "tokenizer.json").write_text("[]")
    with pytest.raises(CheckpointError, match="tokenizer.json cannot be read"):
        open_checkpoint(source)
