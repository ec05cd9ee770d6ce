"""GGUF import: a tiny file written by the gguf package, and files that are not what they seem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import TINY, hf_logits, tiny_hf_model, tokens

from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.checkpoints.formats.gguf import convert_gguf
from nemo_minitron.errors import CheckpointError

gguf = pytest.importorskip("gguf")

RENAMED = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    path: Path,
    model: Path,
    *,
    architecture: str = "llama",
    template: str | None = None,
    scaling: dict[str, Any] | None = None,
) -> Path:
    """The tensors of a HF model as GGUF, query and key rows in llama.cpp's order for RoPE.

    ``scaling`` are fields below ``llama.rope.scaling.``.
    """
    from safetensors.torch import load_file

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(TINY["num_hidden_layers"])
    writer.add_context_length(TINY["max_position_embeddings"])
    writer.add_embedding_length(TINY["hidden_size"])
    writer.add_feed_forward_length(TINY["intermediate_size"])
    writer.add_head_count(TINY["num_attention_heads"])
    writer.add_head_count_kv(TINY["num_key_value_heads"])
    writer.add_rope_freq_base(TINY["rope_theta"])
    writer.add_rope_dimension_count(TINY["head_dim"])
    writer.add_key_length(TINY["head_dim"])
    writer.add_layer_norm_rms_eps(TINY["rms_norm_eps"])
    writer.add_vocab_size(TINY["vocab_size"])
    words = [
        "<pad>",
        "<s>",
        "</s>",
        "<|im_start|>",
        "<|im_end|>",
        *map(str, range(10)),
        "a",
        "b",
        "ab",
        "aba",
        "\u0120",
    ]
    words += [f"[unused{index}]" for index in range(TINY["vocab_size"] - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_merges(["a b", "ab a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    if template:
        writer.add_chat_template(template)
    for key, value in (scaling or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}
        add[type(value)](f"llama.rope.scaling.{key}", value)
    for name, tensor in load_file(model / "model.safetensors").items():
        heads = {"q_proj": TINY["num_attention_heads"], "k_proj": TINY["num_key_value_heads"]}.get(name.split(".")[-2])
        if heads:
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
        for ours, theirs in RENAMED.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, np.ascontiguousarray(tensor.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_weights_tokenizer_and_template(tmp_path: Path) -> None:
    model = tiny_hf_model(tmp_path / "model")
    converted = convert_gguf(write_gguf(tmp_path / "tiny.gguf", model), tmp_path / "out")
    source = open_checkpoint(model)
    assert converted.shape == source.shape
    assert converted.architecture.norm_epsilon == 1e-5
    for name in source.weights.names():
        assert torch.equal(converted.weights.tensor(name), source.weights.tensor(name)), name
    assert torch.equal(hf_logits(tmp_path / "out", tokens()), hf_logits(model, tokens()))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer("a").input_ids == [15]  # no first token: the file says so
    assert tokenizer.tokenize("ab 42") == ["ab", "\u0120", "4", "2"]  # digits one by one, the space before them its own
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "ab"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    assert {file.name for file in (tmp_path / "out").iterdir()}.isdisjoint({"tokenizer.model"})


def test_the_files_own_template_is_kept(tmp_path: Path) -> None:
    model = tiny_hf_model(tmp_path / "model", tied=True)
    source = write_gguf(tmp_path / "tiny.gguf", model, template="{{ messages[0]['content'] }}!")
    converted = convert_gguf(source, tmp_path / "out", dtype="bfloat16")
    assert converted.shape.tied_embeddings
    assert converted.architecture.dtype == "bfloat16"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab!"


def test_bad_files(tmp_path: Path) -> None:
    model = tiny_hf_model(tmp_path / "model")
    with pytest.raises(CheckpointError, match="does not exist"):
        convert_gguf(tmp_path / "nowhere.gguf", tmp_path / "out")
    foreign = write_gguf(tmp_path / "foreign.gguf", model, architecture="falcon")
    with pytest.raises(CheckpointError, match="architecture 'falcon' is not supported"):
        convert_gguf(foreign, tmp_path / "out")
    whole = write_gguf(tmp_path / "tiny.gguf", model).read_bytes()
    (tmp_path / "half.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"half\.gguf"):
        convert_gguf(tmp_path / "half.gguf", tmp_path / "out")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        convert_gguf(tmp_path / "text.gguf", tmp_path / "out")
    assert open_checkpoint(tmp_path / "tiny.gguf").format == "gguf"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"type": "none"}, None),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 16, "finetuned": True},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        ),
    ],
)
def test_scaled_rotary_embeddings_are_kept(
    tmp_path: Path, scaling: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    model = tiny_hf_model(tmp_path / "model", rope_scaling=expected)
    converted = convert_gguf(write_gguf(tmp_path / "tiny.gguf", model, scaling=scaling), tmp_path / "out")
    assert converted.architecture.rotary_scaling == expected
    assert torch.equal(hf_logits(tmp_path / "out", tokens()), hf_logits(model, tokens()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaling": {"type": "longrope", "factor": 4.0}}, "scaling.type='longrope'.* is not supported"),
        ({"scaling": {"type": "yarn", "factor": 4.0, "attn_factor": 0.5}}, "scaling.attn_factor=0.5 is not supported"),
    ],
)
def test_scalings_that_the_file_does_not_describe_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_hf_model(tmp_path / "model"), **options)
    with pytest.raises(CheckpointError, match=message):
        convert_gguf(file, tmp_path / "out")
