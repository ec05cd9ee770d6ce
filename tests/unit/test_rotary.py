"""RoPE scaling: frequencies and factors against transformers', what a ``config.json`` may say of it, and formats."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_minitron import accounting
from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.formats import FORMATS
from nemo_minitron.checkpoints.formats.huggingface.config import from_hf, to_hf
from nemo_minitron.checkpoints.formats.huggingface.rotary import read_scaling
from nemo_minitron.errors import CheckpointError
from nemo_minitron.runtime.rotary import attention_settings, yarn_attention_factor, yarn_frequencies

WHERE = Path("config.json")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "factor": 2.5}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 76,
    "max_position_embeddings": 128,
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "rope_theta": 20000.0,
    "vocab_size": 131,
}


def of_transformers(config: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Inverse frequencies and attention factor by the installed transformers."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = config["rope_scaling"]["rope_type"]
    return ROPE_INIT_FUNCTIONS[kind](SimpleNamespace(**{"partial_rotary_factor": 1.0, **config}), "cpu")


def described(rope: Any, **changes: Any) -> Architecture:
    return from_hf({**CONFIG, "rope_scaling": rope, **changes}, WHERE)[1]


@st.composite
def yarns(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A scaling as somebody may have written it, and ``max_position_embeddings`` of its file."""
    original, factor = draw(st.integers(4, 1 << 18)), draw(st.sampled_from([1.0, 1.5, 2.0, 2.5, 4.0, 8, 16.0, 40.0]))
    some = {
        "beta_fast": st.sampled_from([16.0, 32, 48.5]),
        "beta_slow": st.sampled_from([0.5, 1, 2.0]),
        "attention_factor": st.sampled_from([0.5, 1.0, 1.3]),
        "mscale": st.sampled_from([0.0, 0.707, 1.0]),
        "mscale_all_dim": st.sampled_from([0.0, 1.0, 1.2]),
        "truncate": st.sampled_from([True, None]),
    }
    own = draw(st.fixed_dictionaries({}, optional=some))
    original *= 2  # so that every product is a number of tokens
    scaling = {draw(st.sampled_from(["type", "rope_type"])): "yarn", "factor": factor, **own}
    places = {
        "product": ({"original_max_position_embeddings": original}, int(factor * original)),
        "original": ({"original_max_position_embeddings": original}, original),
        "other": ({"original_max_position_embeddings": original}, original + 1234),
        "silent": ({}, original),
    }
    more, positions = places[draw(st.sampled_from(sorted(places)))]
    return scaling | more, positions


@settings(max_examples=200, deadline=None)
@given(yarns(), st.sampled_from([8, 12, 64, 128]), st.sampled_from([1e4, 2e4, 5e5, 1e6, 150000.0]))
def test_yarn_has_the_bits_of_transformers(made: tuple[dict[str, Any], int], dim: int, base: float) -> None:
    """From what is written, transformers computes what is read: the factor stands, whatever the file said before."""
    scaling, positions = made
    read, context = read_scaling(scaling, positions)
    assert read is not None
    assert read["factor"] == scaling["factor"]
    assert read["original_max_position_embeddings"] == scaling.get("original_max_position_embeddings", positions)
    assert context == read["factor"] * read["original_max_position_embeddings"]
    config = {"rope_theta": base, "head_dim": dim, "hidden_size": dim, "num_attention_heads": 1}
    frequencies, factor = of_transformers({**config, "rope_scaling": read, "max_position_embeddings": context})
    assert torch.equal(yarn_frequencies(read, base=base, dim=dim), frequencies)
    assert yarn_attention_factor(read) == factor
    assert read_scaling(read, context) == (read, context)


def test_the_scale_of_the_attention() -> None:
    assert attention_settings(described(None), 12) == attention_settings(described(LINEAR), 12) == {}
    found = attention_settings(described({**YARN, "attention_factor": 1.5}), 16)
    assert found == {"softmax_scale": pytest.approx(1.5**2 / 4)}


@pytest.mark.parametrize("rope", [LINEAR, YARN, {**YARN, "beta_fast": 16.0, "mscale": 0.7, "mscale_all_dim": 1.0}])
def test_both_spellings(rope: dict[str, Any]) -> None:
    shape, architecture = from_hf({**CONFIG, "rope_scaling": rope}, WHERE)
    assert architecture.rotary_scaling == rope
    written = to_hf(shape, architecture, dtype="float32")
    assert written["rope_scaling"] == {key: written["rope_parameters"][key] for key in rope} == rope
    older = {key: value for key, value in written.items() if key != "rope_parameters"}
    newer = {key: value for key, value in written.items() if key not in ("rope_scaling", "rope_theta")}
    assert from_hf(older, WHERE) == from_hf(newer, WHERE) == from_hf(written, WHERE) == (shape, architecture)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic' is not supported; supported: .*linear, yarn"),
        ({"rope_type": "longrope", "factor": 2.0}, "'longrope' is not supported"),
        ({"type": "su"}, "'su' is not supported"),
        ({"rope_type": "linear"}, "factor=None: type 'linear' needs a number"),
        ({"rope_type": "linear", "factor": 0.5}, "factor=0.5: type 'linear' needs at least 1"),
        ({"rope_type": "linear", "factor": float("nan")}, "factor=nan"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0}, "beta_fast=3.0 is not known in type 'linear'"),
        ({"rope_type": "yarn"}, "'yarn' needs factor, or original_max_position_embeddings"),
        ({**YARN, "factor": True}, "factor=True"),
        ({**YARN, "attention_factor": 0.0}, "attention_factor=0.0: type 'yarn' needs a number above 0"),
        ({**YARN, "original_max_position_embeddings": 0}, "original_max_position_embeddings=0"),
        ({**YARN, "beta_fast": 1.0}, "beta_fast=1.0 must be above beta_slow=1"),
        ({**YARN, "truncate": False}, "truncate=False is not supported"),
        ({**YARN, "factor": 1.7}, "is no number of tokens"),
        ({**YARN, "extrapolation_factor": 1.0}, "extrapolation_factor=1.0 is not known in type 'yarn'"),
    ],
)
def test_scalings_that_are_refused(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        described(rope)


def test_the_context_follows_the_factor(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "_warned", set())
    with caplog.at_level(logging.WARNING, logger="nemo_minitron"):
        assert described(YARN).max_position_embeddings == 128
        assert described({**YARN, "factor": None}).rotary_scaling == YARN
        assert caplog.messages == []
        assert described(YARN, max_position_embeddings=32).max_position_embeddings == 128
    (warning,) = caplog.messages
    assert warning.endswith("read as max_position_embeddings=128")


def test_a_window_within_the_longer_context() -> None:
    own = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "max_position_embeddings": 32}
    assert described(None, **own, sliding_window=32).sliding_window is None
    assert described(YARN, **own, sliding_window=32).sliding_window == 32
    with pytest.raises(CheckpointError, match="sliding_window=32 is not supported"):
        described(YARN, max_position_embeddings=32, sliding_window=32)


def test_formats_refuse_what_they_cannot_hold() -> None:
    """Before any work: a ``.nemo`` has no YaRN, and an export to NeMo 2 none of its own classes."""
    shape, plain = from_hf(CONFIG, WHERE)
    for rope, family, refusals in (
        (None, "llama", {}),
        (LINEAR, "qwen2", {}),
        (YARN, "llama", {"nemo": "a .nemo cannot hold RoPE scaling of type 'yarn'", "nemo2": "NeMo has no class"}),
        ({"rope_type": "llama3"}, "qwen2", {"nemo2": "NeMo has no class of qwen2 models"}),
        (LINEAR, "nemotron", {"hf": "transformers has no scaled RoPE"}),
    ):
        architecture = dataclasses.replace(plain, family=family, rotary_scaling=rope)
        for form in ("hf", "nemo2", "nemo"):
            found = FORMATS[form].refuses(shape, architecture, export=True)
            assert [refusals[form] in fault for fault in found] == [True] * (form in refusals), (rope, form, found)
        assert not FORMATS["nemo2"].refuses(shape, architecture)  # for further stages a class of ours is written


def of_hub(name: str, **values: Any) -> Any:
    return pytest.param(values, id=name)


#: Keys and values of public configurations, all but those that say nothing about the model.
PUBLIC = [
    of_hub(
        "Llama-3.2-1B-Instruct",
        architectures=["LlamaForCausalLM"],
        attention_bias=False,
        attention_dropout=0.0,
        bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009],
        head_dim=64,
        hidden_act="silu",
        hidden_size=2048,
        initializer_range=0.02,
        intermediate_size=8192,
        max_position_embeddings=131072,
        mlp_bias=False,
        model_type="llama",
        num_attention_heads=32,
        num_hidden_layers=16,
        num_key_value_heads=8,
        pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_scaling={
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        rope_theta=500000.0,
        tie_word_embeddings=True,
        torch_dtype="bfloat16",
        use_cache=True,
        vocab_size=128256,
    ),
    of_hub(
        "Llama-3.3-70B-Instruct",
        architectures=["LlamaForCausalLM"],
        attention_bias=False,
        attention_dropout=0.0,
        bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009],
        head_dim=128,
        hidden_act="silu",
        hidden_size=8192,
        intermediate_size=28672,
        max_position_embeddings=131072,
        mlp_bias=False,
        model_type="llama",
        num_attention_heads=64,
        num_hidden_layers=80,
        num_key_value_heads=8,
        pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_scaling={
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        rope_theta=500000.0,
        tie_word_embeddings=False,
        vocab_size=128256,
    ),
    of_hub(
        "Mistral-Nemo-Instruct-2407",
        architectures=["MistralForCausalLM"],
        attention_dropout=0.0,
        bos_token_id=1,
        eos_token_id=2,
        head_dim=128,
        hidden_act="silu",
        hidden_size=5120,
        intermediate_size=14336,
        max_position_embeddings=131072,
        model_type="mistral",
        num_attention_heads=32,
        num_hidden_layers=40,
        num_key_value_heads=8,
        rms_norm_eps=1e-05,
        rope_theta=1000000.0,
        sliding_window=None,
        tie_word_embeddings=False,
        vocab_size=131072,
    ),
    of_hub(
        "Mistral-Small-24B-Instruct-2501",
        architectures=["MistralForCausalLM"],
        attention_dropout=0.0,
        bos_token_id=1,
        eos_token_id=2,
        head_dim=128,
        hidden_act="silu",
        hidden_size=5120,
        intermediate_size=32768,
        max_position_embeddings=32768,
        model_type="mistral",
        num_attention_heads=32,
        num_hidden_layers=40,
        num_key_value_heads=8,
        rms_norm_eps=1e-05,
        rope_theta=100000000.0,
        sliding_window=None,
        tie_word_embeddings=False,
        vocab_size=131072,
    ),
    of_hub(
        "Qwen2.5-7B-Instruct with YaRN",
        architectures=["Qwen2ForCausalLM"],
        attention_dropout=0.0,
        bos_token_id=151643,
        eos_token_id=151645,
        hidden_act="silu",
        hidden_size=3584,
        intermediate_size=18944,
        max_position_embeddings=32768,
        max_window_layers=28,
        model_type="qwen2",
        num_attention_heads=28,
        num_hidden_layers=28,
        num_key_value_heads=4,
        rms_norm_eps=1e-06,
        rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        rope_theta=1000000.0,
        sliding_window=131072,
        tie_word_embeddings=False,
        use_sliding_window=False,
        vocab_size=152064,
    ),
    of_hub(
        "LLaMA-2-7B-32K",
        architectures=["LlamaForCausalLM"],
        bos_token_id=1,
        eos_token_id=2,
        hidden_act="silu",
        hidden_size=4096,
        intermediate_size=11008,
        max_position_embeddings=32768,
        model_type="llama",
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=32,
        pad_token_id=0,
        pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_scaling={"factor": 8.0, "type": "linear"},
        tie_word_embeddings=False,
        vocab_size=32000,
    ),
    of_hub(
        "vicuna-7b-v1.5-16k",
        architectures=["LlamaForCausalLM"],
        bos_token_id=1,
        eos_token_id=2,
        hidden_act="silu",
        hidden_size=4096,
        intermediate_size=11008,
        max_position_embeddings=4096,
        max_sequence_length=16384,
        model_type="llama",
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=32,
        pad_token_id=0,
        pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_scaling={"factor": 4.0, "type": "linear"},
        tie_word_embeddings=False,
        vocab_size=32000,
    ),
]


@pytest.mark.parametrize("config", PUBLIC)
def test_public_configurations_are_read(config: dict[str, Any]) -> None:
    shape, architecture = from_hf(config, WHERE)
    assert shape.head_dim == config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    assert architecture.rotary_base == config.get("rope_theta", 10000.0)
    scaling = config.get("rope_scaling") or {}
    assert architecture.rotary_type == (scaling.get("rope_type") or scaling.get("type") or "default")
    given = {key: value for key, value in scaling.items() if key != "type"}
    assert given.items() <= (architecture.rotary_scaling or {}).items()
    context = 131072 if architecture.rotary_type == "yarn" else config["max_position_embeddings"]
    assert architecture.max_position_embeddings == context
    assert from_hf(to_hf(shape, architecture, dtype="bfloat16"), WHERE) == (shape, architecture)
