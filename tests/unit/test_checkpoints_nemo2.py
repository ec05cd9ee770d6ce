"""NeMo 2 directories read as data: sizes from ``model.yaml``, refusals, and nothing that a file names is run."""

from __future__ import annotations

import logging
import uuid
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import TestCase

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import tiny_checkpoint, tiny_tokenizer

from nemo_minitron.checkpoints import Checkpoint, open_checkpoint
from nemo_minitron.checkpoints.formats.nemo1.config import from_nemo1, to_nemo1
from nemo_minitron.checkpoints.formats.nemo_known import (
    NEMO1,
    NEMO1_NEUTRAL,
    NEMO2,
    NEMO2_NEUTRAL,
    unknown_settings,
)
from nemo_minitron.checkpoints.formats.torch_dist.writer import write_torch_dist
from nemo_minitron.errors import CheckpointError

LLAMA = "nemo.collections.llm.gpt.model.llama.LlamaConfig"


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint(tmp_path / "hf"))


@pytest.fixture
def native(source: Checkpoint, tmp_path: Path) -> Path:
    """What NeMo leaves, without NeMo: weights, a ``model.yaml``, a tokenizer, and an ``io.json`` to be left alone."""
    path = tmp_path / "native"
    write_torch_dist(source, path / "weights", prefix="module.", dtype="float32", vocab_rows=256, common={})
    tiny_tokenizer(path / "context" / "my_tokenizer")
    (path / "context" / "io.json").write_text('{"objects": {"x": {"type": {"module": "os", "name": "abort"}}}}')
    config = {
        "_target_": LLAMA,
        "num_layers": 3,
        "hidden_size": 48,
        "ffn_hidden_size": 76,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "kv_channels": 12,
        "vocab_size": None,
        "share_embeddings_and_output_weights": False,
        "layernorm_epsilon": 1e-05,
        "rotary_base": 20000,
        "seq_length": 64,
        "normalization": "RMSNorm",
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
    }
    write_yaml(path, {"config": config, "tokenizer": {"pretrained_model_name": "my_tokenizer"}})
    return path


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    (path / "context" / "model.yaml").write_text(yaml.safe_dump(content))


def edit(path: Path, **changes: Any) -> None:
    content = yaml.safe_load((path / "context" / "model.yaml").read_text())
    content["config"] |= changes
    write_yaml(path, content)


def test_sizes_vocabulary_and_special_tokens_are_found(native: Path, source: Checkpoint) -> None:
    opened = open_checkpoint(native)
    assert opened.shape == source.shape
    assert opened.architecture == source.architecture
    assert opened.tokenizer == native / "context" / "my_tokenizer"
    for name in source.weights.names():
        assert torch.equal(opened.weights.tensor(name), source.weights.tensor(name)), name


def test_an_explicit_vocabulary_wins_and_rows_are_the_last_resort(native: Path) -> None:
    edit(native, vocab_size=200)
    assert open_checkpoint(native).shape.vocab_size == 200
    content = yaml.safe_load((native / "context" / "model.yaml").read_text())
    content["tokenizer"] = None
    content["config"]["vocab_size"] = None
    write_yaml(native, content)
    opened = open_checkpoint(native)
    assert opened.tokenizer is None
    assert opened.shape.vocab_size == 256


def test_rope_scaling_of_llama_31(native: Path) -> None:
    name = "nemo.collections.llm.gpt.model.llama.Llama31Config8B"
    edit(native, _target_=name, scale_factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, old_context_len=8192)
    assert open_checkpoint(native).architecture.rotary_scaling == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_windows_count_the_tokens_before(native: Path) -> None:
    """Of NeMo's Mistral; a window as long as the sequences hides nothing."""
    name = "nemo.collections.llm.gpt.model.mistral.MistralConfig7B"
    edit(native, _target_=name, window_size=[31, 0], cp_comm_type="a2a")
    architecture = open_checkpoint(native).architecture
    assert (architecture.sliding_window, set(architecture.layer_types or ())) == (32, {"sliding_attention"})
    edit(native, window_size=[architecture.max_position_embeddings - 1, 0])
    assert open_checkpoint(native).architecture.layer_types is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_target_": "nemo.collections.llm.gpt.model.gemma.GemmaConfig2B"}, "GemmaConfig2B is not supported"),
        ({"_target_": "nemo.collections.llm.gpt.model.llama.Llama4Config"}, "Llama4Config is not supported"),
        ({"normalization": "LayerNorm", "num_moe_experts": 8}, "'LayerNorm' is not supported.*num_moe_experts=8"),
        ({"activation_func": {"_target_": "torch.nn.functional.gelu"}}, "gelu is not supported"),
        ({"window_size": [31, 5]}, r"window_size=\[31, 5\]: must be the number of tokens before a query's own, and 0"),
        ({"window_size": [-1, 0]}, r"window_size=\[-1, 0\]: must be"),
        (
            {
                "_target_": "nemo.collections.llm.gpt.model.base.GPTConfig",
                "add_qkv_bias": True,
                "window_size": [31, 0],
            },
            r"GPTConfig is no qwen2 model: window_size=\[31, 0\] is not supported",
        ),
        ({"hidden_size": 64}, "has shape"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"vocab_size": 100}, "has 131 tokens but the embedding has only 100 rows"),
    ],
)
def test_what_does_not_fit_is_named(native: Path, changes: dict[str, Any], message: str) -> None:
    edit(native, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(native)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"softmax_scale": 0.5}, r"softmax_scale=0\.5 is not supported"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm=True is not"),
        ({"mtp_num_layers": 1, "no_rope_freq": 4}, "mtp_num_layers=1 is not supported.*no_rope_freq=4 is not"),
        ({"qk_l2_norm": True}, "qk_l2_norm=True is not supported"),
        ({"attention_chunk_size": 8192}, "attention_chunk_size=8192 is not known, and may change"),
        (
            {"transformer_layer_spec": {"_target_": "my.layers.spec"}},
            r"transformer_layer_spec=my\.layers\.spec: layers",
        ),
    ],
)
def test_settings_that_nobody_reads_are_refused(native: Path, changes: dict[str, Any], message: str) -> None:
    edit(native, **changes)
    with pytest.raises(CheckpointError, match=rf"model\.yaml: .*{message}"):
        open_checkpoint(native)


def test_a_transformed_model_is_refused(native: Path) -> None:
    content = yaml.safe_load((native / "context" / "model.yaml").read_text())
    write_yaml(native, content | {"model_transform": {"_target_": "nemo.collections.llm.peft.lora.LoRA"}})
    with pytest.raises(CheckpointError, match="model_transform=.*LoRA.* changes the model"):
        open_checkpoint(native)


INVENTED = st.sampled_from([None, False, 0, 0.0, "", [], {}, True, 3, 0.5, "x", [1], {"a": 1}])


@settings(max_examples=40, deadline=None)
@given(key=st.text("abcdefgh", min_size=1, max_size=6), value=INVENTED)
def test_invented_settings_are_refused_or_named(key: str, value: Any) -> None:
    """Of NeMo 2 and of NeMo 1."""
    name = f"invented_{key}_setting"
    for known, neutral in ((NEMO2, NEMO2_NEUTRAL), (NEMO1, NEMO1_NEUTRAL)):
        source = Path(str(uuid.uuid4()))
        with TestCase().assertLogs("nemo_minitron", logging.WARNING) if not value else nullcontext() as logs:
            faults = unknown_settings({name: value, "fp8": "hybrid"}, source, harmless=known, neutral=neutral)
        if value:
            assert [fault.split(" is ")[0] for fault in faults] == [f"{name}={value}"]
        else:
            assert not faults
            assert f"left behind: {name}={value!r}" in logs.output[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"transformer_block_type": "post_ln"},
            r"transformer_block_type='post_ln' is not supported \(needed: 'pre_ln'\)",
        ),
        ({"drop_layers": [1, 2]}, r"drop_layers=\[1, 2\] is not supported"),
        ({"peft": {"peft_scheme": "lora"}}, "peft=.*lora.* is not supported"),
        ({"softmax_scale": 0.5, "clever_attention": True}, "softmax_scale=0.5.*clever_attention=True is not known"),
    ],
)
def test_settings_of_nemo_1_that_nobody_reads(
    source: Checkpoint, changes: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    written = to_nemo1(source.shape, source.architecture, dtype="float32", multiple=128, rows=None)
    content, path = yaml.safe_load(written), Path("model_config.yaml")
    harmless = {"peft": {"peft_scheme": "none"}, "dpo": {"ref_policy_kl_penalty": 0.2}, "activation": "swiglu"}
    caplog.set_level(logging.WARNING, "nemo_minitron")
    assert from_nemo1(content | harmless, path, 131, source.tokenizer)[0] == source.shape
    assert not caplog.records
    with pytest.raises(CheckpointError, match=rf"model_config\.yaml: .*{message}"):
        from_nemo1(content | changes, path, 131, source.tokenizer)


def test_a_tokenizer_outside_the_checkpoint_is_not_followed(native: Path, tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "elsewhere")
    content = yaml.safe_load((native / "context" / "model.yaml").read_text())
    for name in ("../../elsewhere", str(tmp_path / "elsewhere")):
        content["tokenizer"]["pretrained_model_name"] = name
        write_yaml(native, content)
        assert open_checkpoint(native).tokenizer is None


def test_missing_and_hostile_parts(native: Path, tmp_path: Path) -> None:
    yaml_path = native / "context" / "model.yaml"
    yaml_path.write_text(f"config: !!python/object/apply:os.mkdir ['{tmp_path / 'executed'}']")
    with pytest.raises(CheckpointError, match="cannot be read as plain YAML"):
        open_checkpoint(native)
    assert not (tmp_path / "executed").exists()
    yaml_path.write_text("- 1")
    with pytest.raises(CheckpointError, match="is not a model description"):
        open_checkpoint(native)
    write_yaml(native, {"config": {"_target_": LLAMA, "num_attention_heads": 6}})
    with pytest.raises(CheckpointError, match="lacks 'hidden_size'"):
        open_checkpoint(native)
    yaml_path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.yaml is missing"):
        open_checkpoint(native)
    (native / "weights").rename(native / "w")
    with pytest.raises(CheckpointError, match="weights is missing"):
        open_checkpoint(native)


def test_a_damaged_record_is_named(native: Path) -> None:
    (native / "minitron.json").write_text('{"format_version": 99}')
    with pytest.raises(CheckpointError, match="format version 99"):
        open_checkpoint(native)
    (native / "minitron.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"minitron\.json cannot be read"):
        open_checkpoint(native)
